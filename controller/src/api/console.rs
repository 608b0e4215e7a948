//! The serial console: from the caller, over the leader and the node's agent, to the VMM.

use std::pin::Pin;
use std::time::Duration;

use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_proto::v1::{ConsoleInput, ConsoleOutput, DomainState};
use futures::stream::{self, Stream, StreamExt};
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::agents;
use super::errors::invalid;
use super::service::Service;
use super::validate;
use crate::model::{DomainRecord, NodeRecord};
use crate::store::View;
use crate::workflows::Refusal;

/// The caller says what it wants within this.
const FIRST_WAIT: Duration = Duration::from_secs(10);

pub(super) type Output = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

impl Service {
    pub(super) async fn console(
        &self,
        mut input: Streaming<ConsoleInput>,
    ) -> Result<Output, Status> {
        let first = timeout(FIRST_WAIT, input.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the first message did not come within 10 s"))??
            .ok_or_else(|| invalid("name", "", "domains/{id} in the first message"))?;
        let id = validate::domain("name", &first.name)?;
        let view = self.read().await?;
        let (uid, address) = target(&view, id.as_str(), &id.name())?;

        let channel = agents::connect(&address).await?;
        let first = ConsoleInput { name: uid, data: first.data };
        // A caller that breaks off ends the stream; the agent need not know why.
        let rest = input.filter_map(|message| async { message.ok() });
        let rest = rest.map(|message| ConsoleInput { name: String::new(), data: message.data });
        let inputs = stream::once(async { first }).chain(rest);
        let outputs = AgentServiceClient::new(channel).attach_console(inputs).await?;
        Ok(Box::pin(outputs.into_inner()))
    }
}

/// The domain's uid, and where its node's agent is.
fn target(view: &View, id: &str, name: &str) -> Result<(String, String), Refusal> {
    let domain = view
        .get::<DomainRecord>(id)
        .ok_or_else(|| Refusal::NotFound { name: name.to_owned() })?
        .value;
    if domain.state() == DomainState::Lost {
        return Err(Refusal::Precondition {
            subject: name.to_owned(),
            reason: "WRONG_STATE",
            message: format!("{name} is LOST ({}): its console is there too", domain.state_reason),
        });
    }
    let node = view
        .get::<NodeRecord>(&domain.node)
        .ok_or_else(|| Refusal::NotFound { name: format!("nodes/{}", domain.node) })?;
    Ok((domain.uid, node.value.address))
}
