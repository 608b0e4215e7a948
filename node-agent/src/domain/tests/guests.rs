//! What is heard of the agent inside a guest.

use super::*;

use drover_proto::agent::v1::{CallGuestRequest, call_guest_request::Call};
use drover_proto::v1::{GetGuestRequest, GuestInterface, SetGuestPasswordRequest};
use tonic::Code;

use crate::domain::guest::Guests;

fn call(
    host: &Host,
    agent: &Agent,
    call: Call,
) -> Result<Option<drover_proto::v1::Guest>, tonic::Status> {
    let guests = Guests::new(host.places(), "host1".into());
    let request = CallGuestRequest { domain_uid: UID.into(), call: Some(call) };
    agent.block_on(guests.call(request)).map(|answer| answer.guest)
}

fn get() -> Call {
    Call::Get(GetGuestRequest::default())
}

fn password() -> Call {
    let (user, password) = ("root".into(), "secret".into());
    Call::SetPassword(SetGuestPasswordRequest { user, password, ..Default::default() })
}

/// What the agent knows is passed on, cleaned; what it does not know stays empty.
#[test]
fn a_guest_tells_of_itself_and_takes_a_password() {
    let host = Host::new();
    let agent = host.agent();
    let error = call(&host, &agent, get()).unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("does not run on node host1"), "{}", error.message());

    let spec = Some(host.spec("agent"));
    agent.wish(&host, vec![Assignment { spec, ..host.run(1) }]);
    agent.until_state(ObservedState::Running);
    let guest = call(&host, &agent, get()).unwrap().unwrap();
    assert_eq!((guest.host_name.as_str(), guest.operating_system.as_str()), ("web -1", ""));
    let eth0 = GuestInterface {
        name: "eth0".into(),
        mac: "52:54:00:00:00:01".into(),
        addresses: vec!["10.78.0.11/24".into()],
    };
    assert_eq!(guest.interfaces[0], eth0);
    assert_eq!(guest.interfaces[1].addresses, Vec::<String>::new());
    assert!(call(&host, &agent, password()).unwrap().is_none());
}

#[test]
fn a_guest_without_an_agent_says_so() {
    for (behaviour, words) in [("no agent", "install qemu-guest-agent"), ("agent-old", "refused")] {
        let host = Host::new();
        let agent = host.agent();
        let spec = Some(host.spec(behaviour));
        agent.wish(&host, vec![Assignment { spec, ..host.run(1) }]);
        agent.until_state(ObservedState::Running);
        let error = call(&host, &agent, get()).unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.message().contains(words), "{}", error.message());
        let error = call(&host, &agent, password()).unwrap_err();
        assert!(!error.message().contains("secret"), "{}", error.message());
    }
}
