//! The console of a domain, passed through from its VMM's socket.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::v1::{ConsoleInput, ConsoleOutput};
use drover_proto::vmm::v1::vmm_service_client::VmmServiceClient;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::domain::client::channel;
use crate::records::Places;
use crate::wanted::is_uid;

/// How long the first message, and the VMM's answer to it, may take.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// Pieces of text that wait for a slow reader; then its stream waits, and the guest does not.
const PIECES_MAX: usize = 16;
/// Readers at the same time, of all consoles of the node.
const READERS_MAX: usize = 256;

/// What AttachConsole answers.
pub type ConsoleAnswers = ReceiverStream<Result<ConsoleOutput, Status>>;

/// Serves the consoles of the domains of this node.
#[derive(Debug, Clone)]
pub struct Console {
    places: Places,
    node: String,
    readers: Arc<Semaphore>,
}

impl Console {
    /// Of domains whose files lie in `places`.
    pub fn new(places: Places, node: String) -> Self {
        Self { places, node, readers: Arc::new(Semaphore::new(READERS_MAX)) }
    }

    /// As AgentService.AttachConsole.
    pub(crate) async fn attach(
        &self,
        mut input: Streaming<ConsoleInput>,
    ) -> Result<ConsoleAnswers, Status> {
        let reader = Arc::clone(&self.readers).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{READERS_MAX} consoles are open on node {}; close one",
                self.node
            ))
        })?;
        let first = tokio::time::timeout(ATTACH_TIMEOUT, input.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no first message within 10 s"))??
            .ok_or_else(|| Status::invalid_argument("name: the first message carries it"))?;
        let uid = first.name.clone();
        if !is_uid(&uid) {
            return Err(Status::invalid_argument(format!("name: {uid:?}: give a domain's uid")));
        }
        let socket = self.places.domain(&uid).socket;
        let vmm = channel(&socket).await.map_err(|_| {
            Status::not_found(format!("name: {uid}: no VMM of it runs on node {}", self.node))
        })?;
        let (to_vmm, input_pieces) = mpsc::channel(PIECES_MAX);
        let _ = to_vmm.try_send(first);
        let mut client = VmmServiceClient::new(vmm);
        let attach = client.attach_console(ReceiverStream::new(input_pieces));
        let mut output = tokio::time::timeout(ATTACH_TIMEOUT, attach)
            .await
            .map_err(|_| Status::deadline_exceeded("the VMM does not answer"))??
            .into_inner();
        let (to_caller, output_pieces) = mpsc::channel(PIECES_MAX);
        // Keys go in until the caller has no more; the console goes on being read.
        tokio::spawn(async move {
            while let Ok(Some(piece)) = input.message().await {
                if to_vmm.send(piece).await.is_err() {
                    return;
                }
            }
            // The VMM sees the end of input only when the caller has gone.
            to_vmm.closed().await;
        });
        tokio::spawn(async move {
            let _until_it_ends = reader;
            loop {
                let piece = tokio::select! {
                    piece = output.message() => piece,
                    () = to_caller.closed() => return,
                };
                let piece = match piece {
                    Ok(Some(piece)) => Ok(piece),
                    Ok(None) => return,
                    Err(status) => Err(status),
                };
                let last = piece.is_err();
                if to_caller.send(piece).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(output_pieces))
    }
}
