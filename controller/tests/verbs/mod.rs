//! Operators' verbs on one domain as callers meet them: what is refused, and what reaches the agent
//! inside a guest. What becomes of what is accepted is shown in `workflows/tests/verbs.rs`.

use drover_proto::agent::v1::call_guest_request::Call;
use drover_proto::v1::{
    DiskLimits, DiskResize, DomainState, EndRescueRequest, GetGuestRequest, OperationState,
    ReinstallDomainRequest, RescueDomainRequest, ResizeDomainRequest, SaveDomainRequest,
    SetGuestPasswordRequest, StopDomainRequest,
};
use tonic::Code;

use crate::images::world;

const WEB: &str = "domains/web";
const REQUEST_ID: &str = "11111111-2222-4333-8444-555555555555";

fn resize() -> ResizeDomainRequest {
    ResizeDomainRequest { name: WEB.into(), ..ResizeDomainRequest::default() }
}

fn refused<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> (Code, String) {
    let status = answer.err().expect("it is refused");
    (status.code(), status.message().to_owned())
}

/// I7.
#[tokio::test(flavor = "multi_thread")]
async fn bad_verbs_are_refused_with_their_field() {
    let world = world().await;
    let client = world.controllers.client(1);
    assert_eq!(client.run_domain("web", "a").await.state(), OperationState::Succeeded);
    let before = client.domain("web").await;
    let mut domains = client.domains();

    let twice = vec![DiskResize { size_bytes: 1 << 30, ..DiskResize::default() }; 2];
    let odd = vec![DiskResize { size_bytes: 1, ..DiskResize::default() }];
    let slow = DiskLimits { bytes_per_second: 1, ..DiskLimits::default() };
    let slow = vec![DiskResize { limits: Some(slow), ..DiskResize::default() }];
    let none = vec![DiskResize { size_bytes: 1 << 30, ..DiskResize::default() }];
    for (field, request) in [
        ("name", ResizeDomainRequest { name: "web".into(), ..resize() }),
        ("request_id", ResizeDomainRequest { request_id: "x".into(), vcpus: 1, ..resize() }),
        ("vcpus", resize()),
        ("vcpus", ResizeDomainRequest { vcpus: 9, ..resize() }),
        ("memory_bytes", ResizeDomainRequest { memory_bytes: 1000, ..resize() }),
        ("disks[1].disk", ResizeDomainRequest { disks: twice, ..resize() }),
        ("disks[0].size_bytes", ResizeDomainRequest { disks: odd, ..resize() }),
        ("disks[0].size_bytes", ResizeDomainRequest { disks: vec![<_>::default()], ..resize() }),
        ("disks[0].limits", ResizeDomainRequest { disks: slow, ..resize() }),
        // It has none.
        ("disks[0].disk", ResizeDomainRequest { disks: none, ..resize() }),
    ] {
        let (code, text) = refused(domains.resize_domain(request).await);
        assert_eq!(code, Code::InvalidArgument, "{text}");
        assert!(text.starts_with(field), "{field}: {text}");
    }
    let large = ResizeDomainRequest { memory_bytes: 64 << 30, ..resize() };
    let (code, text) = refused(domains.resize_domain(large).await);
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    assert!(text.contains("is on nodes/a, which has no room: it needs"), "{text}");

    let image = |image: &str| RescueDomainRequest {
        name: WEB.into(),
        image: image.into(),
        ..RescueDomainRequest::default()
    };
    let (code, text) = refused(domains.rescue_domain(image("")).await);
    assert_eq!((code, text.starts_with("image: ")), (Code::InvalidArgument, true), "{text}");
    let reinstall = ReinstallDomainRequest {
        name: WEB.into(),
        image: "debian".into(),
        ..ReinstallDomainRequest::default()
    };
    let (code, text) = refused(domains.reinstall_domain(reinstall).await);
    assert_eq!((code, text.starts_with("image: ")), (Code::InvalidArgument, true), "{text}");

    // It runs.
    let (code, text) = refused(domains.rescue_domain(image("images/none")).await);
    assert_eq!((code, text.contains("stop it first")), (Code::FailedPrecondition, true), "{text}");
    let end = EndRescueRequest { name: WEB.into(), ..EndRescueRequest::default() };
    let (code, text) = refused(domains.end_rescue(end).await);
    assert_eq!((code, text.contains("stop it first")), (Code::FailedPrecondition, true), "{text}");
    assert_eq!(client.domain("web").await, before, "nothing has changed");

    // Stopped, it is not saved, and has no disk to be rescued.
    let stop = StopDomainRequest { name: WEB.into(), force: true, ..StopDomainRequest::default() };
    let stopping = domains.stop_domain(stop).await.unwrap().into_inner();
    assert_eq!(client.wait(&stopping.name).await.state(), OperationState::Succeeded);
    let save = SaveDomainRequest { name: WEB.into(), ..SaveDomainRequest::default() };
    let (code, text) = refused(domains.save_domain(save).await);
    assert_eq!((code, text.contains("RUNNING")), (Code::FailedPrecondition, true), "{text}");
    let (code, text) = refused(domains.rescue_domain(image("images/none")).await);
    assert_eq!((code, text.contains("no disks")), (Code::FailedPrecondition, true), "{text}");
    assert_eq!(client.domain("web").await.state(), DomainState::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resize_is_carried_out_once() {
    let world = world().await;
    let client = world.controllers.client(1);
    client.run_domain("web", "a").await;
    let request = ResizeDomainRequest { request_id: REQUEST_ID.into(), vcpus: 2, ..resize() };
    let mut domains = client.domains();
    let first = domains.resize_domain(request.clone()).await.unwrap().into_inner();
    assert_eq!(first.state(), OperationState::Succeeded, "{first:?}");
    let again = domains.resize_domain(request.clone()).await.unwrap().into_inner();
    assert_eq!(again.name, first.name);
    let other = ResizeDomainRequest { vcpus: 3, ..request };
    assert_eq!(refused(domains.resize_domain(other).await).0, Code::InvalidArgument);
    let web = client.domain("web").await;
    assert_eq!((web.next_vcpus, web.spec.unwrap().vcpus), (2, 1));
    assert_eq!(web.generation_id.len(), 36);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_asked_through_its_nodes_agent() {
    let world = world().await;
    let client = world.controllers.client(1);
    let mut domains = client.domains();
    let get = || GetGuestRequest { name: WEB.into() };
    assert_eq!(refused(domains.get_guest(get()).await).0, Code::NotFound);
    client.run_domain("web", "a").await;
    let uid = client.domain("web").await.uid;

    let guest = domains.get_guest(get()).await.unwrap().into_inner();
    assert_eq!(guest.host_name, "web");
    let set = |user: &str, password: &str| SetGuestPasswordRequest {
        name: WEB.into(),
        user: user.into(),
        password: password.into(),
    };
    domains.set_guest_password(set("root", "correct horse")).await.unwrap();
    let asked = world.guests.lock().unwrap().clone();
    assert!(asked.iter().all(|asked| asked.domain_uid == uid), "{asked:?}");
    let Some(Call::SetPassword(said)) = &asked[1].call else { panic!("{asked:?}") };
    assert_eq!((said.user.as_str(), said.password.as_str()), ("root", "correct horse"));

    for (user, password, field) in [("a:b", "secret", "user"), ("root", "sec\nret", "password")] {
        let (code, text) = refused(domains.set_guest_password(set(user, password)).await);
        assert_eq!((code, text.starts_with(field)), (Code::InvalidArgument, true), "{text}");
        assert!(!text.contains("sec"), "{text}");
    }
    let stop = StopDomainRequest { name: WEB.into(), force: true, ..StopDomainRequest::default() };
    let stopping = domains.stop_domain(stop).await.unwrap().into_inner();
    client.wait(&stopping.name).await;
    assert_eq!(refused(domains.get_guest(get()).await).0, Code::FailedPrecondition);
    assert_eq!(world.guests.lock().unwrap().len(), 2, "nobody else was asked");
}
