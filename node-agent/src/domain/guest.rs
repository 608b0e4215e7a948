//! What the agent inside a guest is asked: how the guest calls itself, what it runs, which
//! addresses it has; and to set a password.
//!
//! Nothing of what it answers is believed (I6): texts are cut and cleaned, lists are bounded, and
//! an answer of another shape is no answer. A command that it does not know leaves its fields
//! empty; only that no agent is there, or none that answers, is an error.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use drover_proto::agent::v1::{CallGuestRequest, CallGuestResponse, call_guest_request::Call};
use drover_proto::v1::{Guest, GuestInterface, SetGuestPasswordRequest};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::client::{self, VmmClient};
use crate::error::Error;
use crate::records::Places;
use crate::wanted::is_uid;

/// One answer of the guest's agent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// All answers of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls at the same time, of all guests of the node.
const CALLS_MAX: usize = 64;
/// Whoever gets it as a value may print it.
const TEXT_CHARS_MAX: usize = 256;
const INTERFACES_MAX: usize = 32;
const ADDRESSES_MAX: usize = 32;
const USER_BYTES_MAX: usize = 32;
const PASSWORD_BYTES_MAX: usize = 1 << 10;

/// Calls the agents of the guests of this node.
#[derive(Debug, Clone)]
pub struct Guests {
    places: Places,
    node: String,
    calls: Arc<Semaphore>,
}

impl Guests {
    /// Of domains whose files lie in `places`.
    pub fn new(places: Places, node: String) -> Self {
        Self { places, node, calls: Arc::new(Semaphore::new(CALLS_MAX)) }
    }

    /// As AgentService.CallGuest.
    pub(crate) async fn call(
        &self,
        request: CallGuestRequest,
    ) -> Result<CallGuestResponse, Status> {
        let CallGuestRequest { domain_uid: uid, call } = request;
        if !is_uid(&uid) {
            let words = format!("domain_uid: {uid:?}: give a domain's uid");
            return Err(Status::invalid_argument(words));
        }
        let call = call.ok_or_else(|| {
            Status::invalid_argument("call: is not given; accepted: get, set_password")
        })?;
        // First what changes nothing.
        let command = match &call {
            Call::Get(_) => None,
            Call::SetPassword(request) => Some(password_command(request)?),
        };
        let _call = self.calls.try_acquire().map_err(|_| {
            let words = format!("{CALLS_MAX} guests are being asked on node {}", self.node);
            Status::resource_exhausted(words)
        })?;
        let socket = self.places.domain(&uid).socket;
        let vmm = client::connect(&socket).await.map_err(|_| {
            Status::unavailable(format!("domain {uid}: does not run on node {}", self.node))
        })?;
        let mut agent = Agent { vmm, deadline: Instant::now() + CALL_TIMEOUT };
        match command {
            Some(command) => {
                agent.ask(command).await.map_err(|error| in_words(&error))?;
                Ok(CallGuestResponse { guest: None })
            }
            None => agent.describe().await.map(|guest| CallGuestResponse { guest: Some(guest) }),
        }
    }
}

struct Agent {
    vmm: VmmClient,
    deadline: Instant,
}

impl Agent {
    async fn describe(&mut self) -> Result<Guest, Status> {
        let name = self.value::<HostName>("guest-get-host-name").await?;
        let system = self.value::<System>("guest-get-osinfo").await?;
        let interfaces = self.value::<Vec<Interface>>("guest-network-get-interfaces").await?;
        // One that knows none of them is none; or the VMM cannot ask it.
        if let (Err(_), Err(_), Err(refused)) = (&name, &system, &interfaces) {
            return Err(Status::unavailable(format!(
                "no agent in the guest can be asked: {refused}"
            )));
        }
        let system = system.unwrap_or_default();
        let interfaces = interfaces.unwrap_or_default().into_iter().take(INTERFACES_MAX);
        Ok(Guest {
            host_name: text(&name.unwrap_or_default().host_name),
            operating_system: text(&match system.pretty_name.is_empty() {
                true => format!("{} {}", system.name, system.version),
                false => system.pretty_name,
            }),
            kernel: text(&system.kernel_release),
            interfaces: interfaces.map(Interface::present).collect(),
        })
    }

    /// The agent's answer to a command without arguments, nothing in place of nonsense, and its
    /// words when it does not know the command.
    async fn value<T: DeserializeOwned + Default>(
        &mut self,
        command: &str,
    ) -> Result<Result<T, String>, Status> {
        match self.ask(format!("{{\"execute\":\"{command}\"}}")).await {
            Ok(answer) => Ok(Ok(serde_json::from_str(&answer).unwrap_or_default())),
            Err(Error::Vmm { status, .. }) => match status.code() {
                Code::FailedPrecondition => Ok(Err(status.message().to_owned())),
                Code::DataLoss | Code::ResourceExhausted => Ok(Ok(T::default())),
                _ => Err(in_words(&Error::Vmm { call: "GuestAgentCall", status })),
            },
            Err(error) => Err(in_words(&error)),
        }
    }

    async fn ask(&mut self, command: String) -> Result<String, Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // The VMM takes no less.
        let timeout = ANSWER_TIMEOUT.min(left).max(Duration::from_millis(1));
        self.vmm.guest_agent_call(command, timeout).await
    }
}

/// The error of a call for those who do not know the VMM.
fn in_words(error: &Error) -> Status {
    let Error::Vmm { status, .. } = error else {
        return Status::unavailable(format!("the domain's VMM does not answer: {error}"));
    };
    match status.code() {
        Code::Unavailable => Status::unavailable(format!(
            "no agent answers in the guest: install qemu-guest-agent and see that it runs ({})",
            status.message()
        )),
        Code::DeadlineExceeded => {
            Status::deadline_exceeded(format!("the guest: {}", status.message()))
        }
        code => Status::new(code, status.message()),
    }
}

/// The command that sets the password. Its text is never logged.
fn password_command(request: &SetGuestPasswordRequest) -> Result<String, Status> {
    let SetGuestPasswordRequest { user, password, .. } = request;
    let may_be = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_' || c == b'-';
    if user.is_empty() || user.len() > USER_BYTES_MAX || !user.bytes().all(may_be) {
        let shown: String = user.chars().take(USER_BYTES_MAX).collect();
        return Err(Status::invalid_argument(format!(
            "user: {shown:?}; accepted: 1 to {USER_BYTES_MAX} of a-z, 0-9, _ and -"
        )));
    }
    // What it is, is nobody's business.
    let wrong = match password.len() {
        0 => Some("is empty".to_owned()),
        bytes if bytes > PASSWORD_BYTES_MAX => Some(format!("has {bytes} bytes")),
        _ if password.chars().any(char::is_control) => Some("has a control character".to_owned()),
        _ => None,
    };
    if let Some(wrong) = wrong {
        return Err(Status::invalid_argument(format!(
            "password: {wrong}; accepted: 1 to {PASSWORD_BYTES_MAX} bytes without control \
             characters"
        )));
    }
    let command = serde_json::json!({
        "execute": "guest-set-user-password",
        "arguments": { "username": user, "password": BASE64.encode(password), "crypted": false },
    });
    Ok(command.to_string())
}

/// The guest's word, for people: one line, of bounded length.
fn text(said: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let text: String = said.trim().chars().take(TEXT_CHARS_MAX).map(clean).collect();
    text.trim_end().to_owned()
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct HostName {
    host_name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct System {
    pretty_name: String,
    name: String,
    version: String,
    kernel_release: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Interface {
    name: String,
    hardware_address: String,
    ip_addresses: Vec<Address>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Address {
    ip_address: String,
    prefix: u32,
}

impl Interface {
    fn present(self) -> GuestInterface {
        let addresses = self.ip_addresses.into_iter().take(ADDRESSES_MAX);
        GuestInterface {
            name: text(&self.name),
            mac: text(&self.hardware_address),
            addresses: addresses
                .map(|address| format!("{}/{}", text(&address.ip_address), address.prefix))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(user: &str, password: &str) -> String {
        let request = SetGuestPasswordRequest {
            user: user.into(),
            password: password.into(),
            ..Default::default()
        };
        let status = password_command(&request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        status.message().to_owned()
    }

    /// What is wrong is named with what would be accepted; the password itself is not.
    #[test]
    fn a_password_is_checked_and_never_shown() {
        for user in ["", "Root", "a b", "ä", "x\n", &"x".repeat(33)] {
            let said = refusal(user, "secret");
            assert!(said.starts_with("user: ") && !said.contains("secret"), "{said}");
        }
        for (password, words) in [
            ("", "password: is empty"),
            ("secret\n", "control character"),
            (&"secret".repeat(200), "has 1200 bytes"),
        ] {
            let said = refusal("root", password);
            assert!(said.contains(words) && !said.contains("secret"), "{said}");
        }
        let request = SetGuestPasswordRequest {
            user: "deb-1_x".into(),
            password: "\"ü }".into(),
            ..Default::default()
        };
        let command: serde_json::Value =
            serde_json::from_str(&password_command(&request).unwrap()).unwrap();
        let arguments = &command["arguments"];
        assert_eq!(arguments["username"], "deb-1_x");
        let sent = BASE64.decode(arguments["password"].as_str().unwrap()).unwrap();
        assert_eq!(sent, "\"ü }".as_bytes());
    }

    #[test]
    fn a_guests_word_is_one_short_line() {
        assert_eq!(text(" web\u{1b}[31m\n1 "), "web [31m 1");
        assert_eq!(text(&"ü".repeat(1000)).chars().count(), TEXT_CHARS_MAX);
    }
}
