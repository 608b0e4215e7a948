//! What is asked of the agent inside a guest: from the caller, over the leader and the node's
//! agent, to the VMM. Nothing of it is kept, and a password is in no message of ours.

use std::time::Duration;

use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_proto::agent::v1::call_guest_request::Call;
use drover_proto::agent::v1::{CallGuestRequest, CallGuestResponse};
use drover_proto::v1::{DomainState, GetGuestRequest, SetGuestPasswordRequest};
use tokio::time::timeout;
use tonic::Status;

use super::errors::{excerpt, invalid};
use super::service::Service;
use super::{agents, validate};
use crate::model::{DomainId, DomainRecord, NodeRecord};
use crate::store::View;
use crate::workflows::Refusal;

/// A guest that is asked several things, each of which its node bounds.
const GUEST_WAIT: Duration = Duration::from_secs(30);
/// What a guest says is bounded by its node; this is far above.
const ANSWER_BYTES_MAX: usize = 256 << 10;
const USER_BYTES_MAX: usize = 32;
const PASSWORD_BYTES_MAX: usize = 1 << 10;

impl Service {
    pub(super) async fn call_guest(
        &self,
        name: &str,
        call: Call,
    ) -> Result<CallGuestResponse, Status> {
        let id = validate::domain("name", name)?;
        let (domain_uid, address) = target(&self.read().await?, &id)?;
        let asked = async {
            let channel = agents::connect(&address).await?;
            let mut agent =
                AgentServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
            agent.call_guest(CallGuestRequest { domain_uid, call: Some(call) }).await
        };
        let silent = |_| {
            let wait = GUEST_WAIT.as_secs();
            Status::deadline_exceeded(format!("{}: no answer within {wait} s", id.name()))
        };
        Ok(timeout(GUEST_WAIT, asked).await.map_err(silent)??.into_inner())
    }
}

/// The name in it is the caller's; the agent knows the domain by its uid.
pub(super) fn get() -> Call {
    Call::Get(GetGuestRequest::default())
}

/// # Errors
/// A user or password that no guest takes; the text never has the password.
pub(super) fn set_password(request: SetGuestPasswordRequest) -> Result<Call, Refusal> {
    let SetGuestPasswordRequest { user, password, .. } = request;
    let odd = |c: char| c.is_control() || c.is_whitespace() || c == ':' || c == '/';
    if user.is_empty() || user.len() > USER_BYTES_MAX || user.chars().any(odd) {
        let expected = format!(
            "the name of a user in the guest: 1 to {USER_BYTES_MAX} bytes without spaces, ':' and \
             '/'"
        );
        return Err(invalid("user", &excerpt(&user), &expected));
    }
    let bytes = password.len();
    if !(1..=PASSWORD_BYTES_MAX).contains(&bytes) || password.chars().any(char::is_control) {
        let expected = format!("1 to {PASSWORD_BYTES_MAX} bytes of text in one line");
        return Err(invalid("password", &format!("({bytes} bytes)"), &expected));
    }
    Ok(Call::SetPassword(SetGuestPasswordRequest { name: String::new(), user, password }))
}

/// The domain's uid, and where its node's agent is.
fn target(view: &View, id: &DomainId) -> Result<(String, String), Refusal> {
    let row = view
        .get::<DomainRecord>(id.as_str())
        .ok_or_else(|| Refusal::NotFound { name: id.name() })?;
    let domain = row.value;
    if !matches!(domain.state(), DomainState::Running | DomainState::Migrating) {
        let state = domain.state().as_str_name().trim_start_matches("DOMAIN_STATE_");
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "WRONG_STATE",
            message: format!(
                "{} is {state}: only the guest of one that is RUNNING can be asked",
                id.name()
            ),
        });
    }
    let node = view
        .get::<NodeRecord>(&domain.node)
        .ok_or_else(|| Refusal::NotFound { name: format!("nodes/{}", domain.node) })?;
    Ok((domain.uid, node.value.address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_that_is_refused_is_not_repeated() {
        let request = |user: &str, password: &str| SetGuestPasswordRequest {
            name: "domains/web".into(),
            user: user.into(),
            password: password.into(),
        };
        assert!(set_password(request("root", "correct horse")).is_ok());
        let long = "secret".repeat(200);
        for (user, password, field) in [
            ("", "secret", "user"),
            ("a:b", "secret", "user"),
            ("root", "", "password"),
            ("root", "secret\nroot:x", "password"),
            ("root", &long, "password"),
        ] {
            let refused = set_password(request(user, password)).unwrap_err();
            let text = format!("{refused} {refused:?}");
            assert!(text.starts_with(&format!("{field}: ")), "{text}");
            assert!(!text.contains("secret"), "{text}");
        }
    }
}
