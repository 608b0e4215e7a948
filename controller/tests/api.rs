//! The API as callers meet it: real controllers, real gRPC, agents that speak the protocol.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod images;
mod service;
mod snapshots;
mod verbs;

use std::sync::{Arc, Mutex};

use drover_proto::v1::cluster_service_client::ClusterServiceClient;
use drover_proto::v1::event_service_client::EventServiceClient;
use drover_proto::v1::{
    CancelOperationRequest, DeleteDomainRequest, DeleteNodeRequest, DomainState, DrainNodeRequest,
    DrainState, GetDomainRequest, GetNodeRequest, GetOperationRequest, GetStatusRequest,
    ListDomainsRequest, ListEventsRequest, MigrateDomainRequest, MigrationPhase, MoveState,
    OperationState, WatchEventsRequest,
};
use service::agent::{self, Shared};
use service::{Controllers, create, within};
use tokio::sync::watch;
use tonic::Code;
use tonic_types::StatusExt;

fn hosts() -> Shared {
    Arc::new(Mutex::default())
}

/// Agents of these nodes, all in session.
async fn agents(controllers: &Controllers, names: &[&str], hosts: &Shared) -> Vec<agent::Agent> {
    let mut agents = Vec::new();
    for name in names {
        let mut agent = agent::start(name, controllers.addresses(), hosts);
        let opened = agent.sessions.wait_for(|count| *count > 0);
        within("a session", opened).await.unwrap();
        agents.push(agent);
    }
    agents
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_lives_moves_and_goes() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a", "b"], &hosts).await;
    let client = controllers.client(1);

    let created = client.run_domain("web", "a").await;
    assert_eq!(created.state(), OperationState::Succeeded, "{created:?}");
    assert_eq!(client.domain("web").await.state(), DomainState::Running);

    let request = MigrateDomainRequest { name: "domains/web".into(), ..Default::default() };
    let moving = client.domains().migrate_domain(request).await.unwrap().into_inner();
    let moved = client.wait(&moving.name).await;
    assert_eq!(moved.state(), OperationState::Succeeded, "{moved:?}");
    let report = moved.migration.unwrap();
    assert_eq!((report.phase(), report.pause_us), (MigrationPhase::Done, 4_200));
    let web = client.domain("web").await;
    assert_eq!((web.node.as_str(), web.epoch), ("nodes/b", 2));

    let delete = DeleteDomainRequest {
        name: "domains/web".into(),
        force: true,
        ..DeleteDomainRequest::default()
    };
    let gone = client.domains().delete_domain(delete).await.unwrap().into_inner();
    assert_eq!(client.wait(&gone.name).await.state(), OperationState::Succeeded);
    let missing = GetDomainRequest { name: "domains/web".into() };
    assert_eq!(client.domains().get_domain(missing).await.unwrap_err().code(), Code::NotFound);
    assert!(!hosts.lock().unwrap().twice);
}

/// I7: one clear error each, with the field and what is accepted, and nothing changed.
#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_with_its_field() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a"], &hosts).await;
    let client = controllers.client(1);
    let mut domains = client.domains();

    let field_of = |status: &tonic::Status| {
        let details = status.get_error_details();
        let info = details.error_info().expect("every error has ErrorInfo");
        assert_eq!(info.domain, "drover");
        let violation = details.bad_request().map(|bad| bad.field_violations[0].field.clone());
        violation.unwrap_or_default()
    };
    let mut zero = create("web", "");
    zero.domain.as_mut().unwrap().spec.as_mut().unwrap().vcpus = 0;
    let mut odd = create("web", "");
    odd.domain.as_mut().unwrap().spec.as_mut().unwrap().memory_bytes = 1000;
    let mut relative = create("web", "");
    let spec = relative.domain.as_mut().unwrap().spec.as_mut().unwrap();
    spec.boot.as_mut().unwrap().kernel = "vmlinuz".into();
    let mut slash = create("web", "");
    slash.domain.as_mut().unwrap().name = "domains/a/b".into();
    let mut id = create("web", "");
    id.request_id = "not-a-uuid".into();
    for (request, field) in [
        (zero, "domain.spec.vcpus"),
        (odd, "domain.spec.memory_bytes"),
        (relative, "domain.spec.boot.kernel"),
        (slash, "domain.name"),
        (id, "request_id"),
    ] {
        let status = domains.create_domain(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert_eq!(field_of(&status), field, "{status}");
    }

    let mut large = create("web", "");
    large.domain.as_mut().unwrap().spec.as_mut().unwrap().memory_bytes = 64 << 30;
    let status = domains.create_domain(large).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let text = status.message();
    assert!(text.contains("a: needs 64.0 GiB of memory, 2048 MiB of 2048 MiB free"), "{text}");

    let status = domains.create_domain(create("web", "nowhere")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "there is no nodes/nowhere"));

    let wrong = GetOperationRequest { name: "domains/web".into() };
    let status = client.operations().get_operation(wrong).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("operations/{id}"), "{status}");

    let list = ListDomainsRequest::default();
    assert!(domains.list_domains(list).await.unwrap().into_inner().domains.is_empty());

    client.run_domain("web", "a").await;
    let there = MigrateDomainRequest {
        name: "domains/web".into(),
        to_node: "nodes/a".into(),
        ..Default::default()
    };
    let status = domains.migrate_domain(there).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("is on nodes/a already"), "{status}");
    let status = domains.create_domain(create("web", "a")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let forget = DeleteNodeRequest { name: "nodes/a".into(), ..Default::default() };
    let status = client.nodes().delete_node(forget).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("domains/web"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_answered_once() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a"], &hosts).await;
    let client = controllers.client(1);
    let mut request = create("web", "a");
    request.request_id = "11111111-2222-4333-8444-555555555555".into();
    let first = client.domains().create_domain(request.clone()).await.unwrap().into_inner();
    let second = client.domains().create_domain(request.clone()).await.unwrap().into_inner();
    assert_eq!(first.name, second.name);
    client.wait(&first.name).await;
    let third = client.domains().create_domain(request.clone()).await.unwrap().into_inner();
    assert_eq!((third.name, third.state), (first.name, OperationState::Succeeded.into()));
    request.domain.as_mut().unwrap().name = "domains/other".into();
    let status = client.domains().create_domain(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("request_id"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_is_missing_fails_the_create_and_leaves_nothing() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a"], &hosts).await;
    let client = controllers.client(1);
    let mut request = create("web", "a");
    let spec = request.domain.as_mut().unwrap().spec.as_mut().unwrap();
    spec.boot.as_mut().unwrap().kernel = "/boot/missing".into();
    let operation = client.domains().create_domain(request).await.unwrap().into_inner();
    let done = client.wait(&operation.name).await;
    let error = done.error.unwrap();
    assert_eq!(
        (error.reason.as_str(), done.state),
        ("START_FAILED", OperationState::Failed.into())
    );
    assert_eq!(error.message, "/boot/missing: no such file");
    let missing = GetDomainRequest { name: "domains/web".into() };
    assert_eq!(client.domains().get_domain(missing).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_watched_from_a_revision_without_a_gap() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a"], &hosts).await;
    let client = controllers.client(1);
    let mut events = EventServiceClient::new(client.channel());
    let listed = events.list_events(ListEventsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.events[0].reason, "NODE_REGISTERED");
    client.run_domain("web", "a").await;
    let request =
        WatchEventsRequest { from_revision: listed.revision, subject: "domains/web".into() };
    let mut watch = events.watch_events(request).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while seen.last().map(String::as_str) != Some("DOMAIN_STARTED") {
        seen.push(within("an event", watch.message()).await.unwrap().unwrap().reason);
    }
    assert_eq!(seen, ["DOMAIN_CREATED", "DOMAIN_STARTED"]);
    let request = WatchEventsRequest { from_revision: 1 << 40, subject: String::new() };
    let status = events.watch_events(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(status.message().starts_with("from_revision: "), "{status}");
}

/// An agent that is not ours, or claims another's name, is told so and nothing is written.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a"], &hosts).await;
    let address = controllers.addresses()[0].clone();
    let (opened, _) = watch::channel(0);
    let mut foreign = agent::hello("b");
    foreign.cluster_id = "other".into();
    let status = agent::session(&address, foreign, "b", &hosts, &opened).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("--cluster-id test"), "{status}");
    let mut double = agent::hello("a");
    double.node_uid = "99999999-0000-4000-8000-000000000000".into();
    let status = agent::session(&address, double, "a", &hosts, &opened).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("vpsctl node delete a"), "{status}");
    let missing = GetNodeRequest { name: "nodes/b".into() };
    let status = controllers.client(1).nodes().get_node(missing).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

/// The main job: a drain, the leader killed in the middle, the next one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_survives_its_leader_and_any_member_answers() {
    let mut controllers = Controllers::start(3).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a", "b", "c"], &hosts).await;
    let leader = controllers.leader().await;
    let follower = (1..=3).find(|id| *id != leader).unwrap();
    let client = controllers.client(follower);
    for id in ["one", "two", "three"] {
        let created = client.run_domain(id, "a").await;
        assert_eq!(created.state(), OperationState::Succeeded, "{created:?}");
    }

    hosts.lock().unwrap().hold = true;
    let request = DrainNodeRequest { name: "nodes/a".into(), ..Default::default() };
    let drain = client.nodes().drain_node(request.clone()).await.unwrap().into_inner();
    let status = client.nodes().drain_node(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains(&drain.name), "{status}");
    // A stream through a member that does not lead; it shows progress of what is moving.
    let watch = GetOperationRequest { name: drain.name.clone() };
    let mut updates = client.operations().watch_operation(watch).await.unwrap().into_inner();
    loop {
        let update = within("progress", updates.message()).await.unwrap().unwrap();
        let moving = update.moves.iter().filter(|line| line.state() == MoveState::Moving);
        if moving.filter(|line| line.progress_percent > 0).count() == 2 {
            break;
        }
    }
    drop(updates);

    controllers.kill(leader).await;
    let next = controllers.leader().await;
    assert_ne!(next, leader);
    hosts.lock().unwrap().hold = false;
    let done = client.wait(&drain.name).await;
    assert_eq!(done.state(), OperationState::Succeeded, "{done:?}");
    assert!(done.resumed_count >= 1);
    assert!(done.moves.iter().all(|line| line.state() == MoveState::Moved), "{done:?}");
    let node = GetNodeRequest { name: "nodes/a".into() };
    let node = client.nodes().get_node(node).await.unwrap().into_inner();
    assert_eq!((node.drain_state(), node.domain_count), (DrainState::Drained, 0));
    assert!(!hosts.lock().unwrap().twice, "a domain ran on two nodes");

    let mut cluster = ClusterServiceClient::new(controllers.client(follower).channel());
    let status = cluster.get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.answered_by, status.leader_id), (follower, next));
    assert_eq!(status.domains_running, 3);
    assert!(controllers.store(next).view().revision() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_cancelled_and_the_domain_stays() {
    let controllers = Controllers::start(1).await;
    let hosts = hosts();
    let _agents = agents(&controllers, &["a", "b"], &hosts).await;
    let client = controllers.client(1);
    client.run_domain("web", "a").await;
    hosts.lock().unwrap().hold = true;
    let request = MigrateDomainRequest { name: "domains/web".into(), ..Default::default() };
    let moving = client.domains().migrate_domain(request.clone()).await.unwrap().into_inner();
    let status = client.domains().migrate_domain(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    let cancel = CancelOperationRequest { name: moving.name.clone() };
    client.operations().cancel_operation(cancel.clone()).await.unwrap();
    let done = client.wait(&moving.name).await;
    assert_eq!(done.state(), OperationState::Cancelled, "{done:?}");
    assert_eq!(client.domain("web").await.node, "nodes/a");
    let status = client.operations().cancel_operation(cancel).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
}
