//! Waiting for an operation: watches it, shows how it goes, and goes on at the next member when
//! the one that was watched is gone.

use std::time::Duration;

use drover_proto::v1::{
    GetOperationRequest, Operation, OperationState,
    operation_service_client::OperationServiceClient,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_stream::StreamExt;

use crate::client::MESSAGE_BYTES_MAX;

use crate::{
    args::Detach,
    client::Cluster,
    error::Error,
    out::{human::time, print},
    progress::Progress,
};

/// Between two attempts to watch, so that a member that ends each watch at once is not hammered.
const REOPEN_PAUSE: Duration = Duration::from_millis(300);

/// Whether an operation has ended.
pub(crate) fn is_done(operation: &Operation) -> bool {
    use OperationState::{Cancelled, Failed, Succeeded};
    matches!(operation.state(), Succeeded | Failed | Cancelled)
}

/// What a mutation does after it was accepted: prints the name with `--detach`, else waits.
/// Returns the operation as it ended, whatever the end.
pub(crate) async fn accepted(
    cluster: &Cluster,
    operation: Operation,
    detach: &Detach,
    json: bool,
) -> Result<Option<Operation>, Error> {
    if detach.detach {
        if json {
            print(&crate::out::json::object(&operation)?)?;
        } else {
            print(&format!("{}\n", operation.name))?;
        }
        return Ok(None);
    }
    finished(cluster, operation).await.map(Some)
}

/// Waits until the operation has ended, and returns it as it ended.
///
/// # Errors
/// `Interrupted` at Ctrl-C and `Timeout` at `--timeout`; the operation goes on in both.
pub(crate) async fn finished(cluster: &Cluster, operation: Operation) -> Result<Operation, Error> {
    if is_done(&operation) {
        return Ok(operation);
    }
    let name = operation.name.clone();
    // Before anything is shown: who sees progress may press Ctrl-C.
    let mut interrupt = interrupts()?;
    let started = tokio::time::Instant::now();
    let mut progress = Progress::new();
    progress.note(&name);
    progress.update(&operation);
    tokio::select! {
        operation = watched(cluster, &name, &mut progress) => operation,
        _ = interrupt.recv() => Err(Error::Interrupted(name)),
        () = cluster.deadline_passed() => {
            Err(Error::Timeout { operation: name, after: time(started.elapsed()) })
        }
    }
}

/// Ctrl-C, from now on.
pub(crate) fn interrupts() -> Result<Signal, Error> {
    signal(SignalKind::interrupt()).map_err(|e| Error::Local(format!("cannot catch Ctrl-C: {e}")))
}

async fn watched(
    cluster: &Cluster,
    name: &str,
    progress: &mut Progress,
) -> Result<Operation, Error> {
    loop {
        let request = GetOperationRequest { name: name.to_owned() };
        let mut changes = cluster
            .call_again(|rpc| {
                let request = request.clone();
                async move {
                    let client = OperationServiceClient::new(rpc);
                    client
                        .max_decoding_message_size(MESSAGE_BYTES_MAX)
                        .watch_operation(request)
                        .await
                }
            })
            .await?;
        while let Some(change) = changes.next().await {
            match change {
                Ok(operation) => {
                    progress.update(&operation);
                    if is_done(&operation) {
                        return Ok(operation);
                    }
                }
                Err(status) if cluster.turn_after(&status) => {
                    progress.note("the controller that was watched is gone: asking the others");
                    break;
                }
                Err(status) => return Err(status.into()),
            }
        }
        tokio::time::sleep(REOPEN_PAUSE).await;
    }
}

/// An operation that did not succeed is an error.
pub(crate) fn succeeded(operation: Operation) -> Result<Operation, Error> {
    match operation.state() {
        OperationState::Succeeded => Ok(operation),
        _ => Err(Error::Failed(Box::new(operation))),
    }
}
