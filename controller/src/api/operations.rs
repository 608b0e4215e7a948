//! `drover.v1.OperationService`.

use std::pin::Pin;
use std::time::Duration;

use drover_proto::v1::operation_service_server::OperationService;
use drover_proto::v1::{
    CancelOperationRequest, GetOperationRequest, ListOperationsRequest, ListOperationsResponse,
    Operation, OperationState, WaitOperationRequest,
};
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::errors::{Fault, not_leading};
use super::service::{CALL_WAIT, Service};
use super::{page, present, validate};
use crate::model::{OperationId, OperationRecord, is_active};
use crate::session::Lead;
use crate::store::{Versioned, View};
use crate::workflows::Refusal;
use crate::workflows::begin::cancel_operation;

const WAIT_MAX: Duration = Duration::from_secs(600);
/// Progress alone is sent no faster than this.
const WATCH_PACE: Duration = Duration::from_millis(200);
const WATCH_QUEUE: usize = 4;
/// A new leader's workflows begin within this.
const LEAD_WAIT: Duration = Duration::from_secs(5);

type Updates = Pin<Box<dyn Stream<Item = Result<Operation, Status>> + Send>>;

#[tonic::async_trait]
impl OperationService for Service {
    type WatchOperationStream = Updates;

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let id = validate::operation("name", &request.get_ref().name)?;
        let view = self.read().await?;
        let row = known(&view, &id)?;
        Ok(Response::new(present::operation(&row, &view, &self.hub.observed())))
    }

    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        validate::subject("target", &request.target)?;
        let filter = format!("operations on {} {}", request.target, request.active_only);
        let after = page::after(&request.page_token, &filter)?;
        let view = self.read().await?;
        let mut rows: Vec<Versioned<OperationRecord>> = view
            .all::<OperationRecord>()
            .filter(|row| request.target.is_empty() || row.value.target == request.target)
            .filter(|row| !request.active_only || is_active(&row.value))
            .collect();
        // Newest first: ids are random, the order is by creation.
        rows.sort_by_key(|row| std::cmp::Reverse(order(row)));
        let rows = rows.into_iter().filter(|row| after.is_empty() || order(row) < after);
        let rows: Vec<_> = rows.take(size + 1).collect();
        let (rows, next_page_token) = page::cut(rows, size, &filter, order);
        let observed = self.hub.observed();
        let operations = rows.iter().map(|row| present::operation(row, &view, &observed)).collect();
        Ok(Response::new(ListOperationsResponse { operations, next_page_token }))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let id = validate::operation("name", &request.name)?;
        let given = request.timeout.as_ref();
        let wait = validate::duration("timeout", given, WAIT_MAX, WAIT_MAX)?;
        let deadline = Instant::now() + wait;
        let mut lead = self.hub.lead();
        led(&mut lead).await?;
        loop {
            if lead.borrow_and_update().is_none() {
                return Err(not_leading(None));
            }
            let view = self.read().await?;
            let row = known(&view, &id)?;
            let now = present::operation(&row, &view, &self.hub.observed());
            if is_done(&now) {
                return Ok(Response::new(now));
            }
            match timeout_at(deadline, lead.changed()).await {
                Err(_) => return Ok(Response::new(now)),
                Ok(Err(_)) => return Err(not_leading(None)),
                Ok(Ok(())) => {}
            }
        }
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let id = validate::operation("name", &request.get_ref().name)?;
        self.decide(Instant::now() + CALL_WAIT, |cx, view| {
            let row = known(view, &id)?;
            Ok((cancel_operation(cx, &row)?.txn, ()))
        })
        .await?;
        let view = self.read().await?;
        let row = known(&view, &id)?;
        Ok(Response::new(present::operation(&row, &view, &self.hub.observed())))
    }

    async fn watch_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Updates>, Status> {
        let id = validate::operation("name", &request.get_ref().name)?;
        known(&self.read().await?, &id)?;
        let (updates, stream) = mpsc::channel(WATCH_QUEUE);
        let service = self.clone();
        tokio::spawn(async move {
            let end = tokio::select! {
                end = service.follow(&id, &updates) => end,
                () = updates.closed() => return,
            };
            if let Err(status) = end {
                // The caller may be gone.
                let _ = updates.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Service {
    async fn follow(
        &self,
        id: &OperationId,
        updates: &mpsc::Sender<Result<Operation, Status>>,
    ) -> Result<(), Status> {
        let (mut lead, mut reports) = (self.hub.lead(), self.hub.reports());
        let mut sent: Option<Operation> = None;
        led(&mut lead).await?;
        loop {
            // Once it leads no more, nothing would ever change here again.
            if lead.borrow_and_update().is_none() {
                return Err(not_leading(None));
            }
            reports.borrow_and_update();
            let view = self.store.view();
            let row = known(&view, id)?;
            let now = present::operation(&row, &view, &self.hub.observed());
            let done = is_done(&now);
            if sent.as_ref() != Some(&now) {
                sent = Some(now.clone());
                if updates.send(Ok(now)).await.is_err() {
                    return Ok(());
                }
            }
            if done {
                return Ok(());
            }
            tokio::select! {
                changed = lead.changed() => changed.map_err(|_| not_leading(None))?,
                _ = reports.changed() => sleep(WATCH_PACE).await,
            }
        }
    }
}

/// Waits for the workflows of a member that has just begun to lead.
async fn led(lead: &mut watch::Receiver<Option<Lead>>) -> Result<(), Status> {
    match timeout(LEAD_WAIT, lead.wait_for(Option::is_some)).await {
        Ok(Ok(_)) => Ok(()),
        // Another member leads, or soon will.
        _ => Err(not_leading(None)),
    }
}

fn known(view: &View, id: &OperationId) -> Result<Versioned<OperationRecord>, Fault> {
    let row = view.get::<OperationRecord>(id.as_str());
    Ok(row.ok_or_else(|| Refusal::NotFound { name: id.name() })?)
}

fn order(row: &Versioned<OperationRecord>) -> String {
    format!("{:020}-{}", row.create_revision, row.value.id)
}

fn is_done(operation: &Operation) -> bool {
    !matches!(operation.state(), OperationState::Pending | OperationState::Running)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::api::ServiceOptions;
    use crate::model::World;
    use crate::scheduler::Strategy;
    use crate::session::Hub;
    use crate::store::{Leadership, RocksEngine, Shared, State, Store, Txn};
    use crate::workflows::Settings;

    const ID: &str = "11111111-2222-4333-8444-555555555555";

    /// Leadership has moved between the first read and the watch: its end must be told, or the
    /// caller waits for ever.
    #[tokio::test]
    async fn a_watch_that_begins_when_leadership_has_moved_ends() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = OperationRecord { id: ID.into(), ..OperationRecord::default() };
        running.set_state(OperationState::Running);
        let mut state = State::default();
        state.apply(1, &Txn::new().put(&running), |_, _| {});
        let (_state, state) = watch::channel(state);
        let (_leadership, leadership) = watch::channel(Leadership::default());
        let (_status, status) = watch::channel(crate::store::Status::default());
        let (requests, _requests) = mpsc::channel(1);
        let engine = Arc::new(RocksEngine::open(dir.path()).unwrap());
        let store = Store::new(Shared { engine, state, leadership, status, requests });
        let options = ServiceOptions {
            cluster_id: "test".into(),
            member: 1,
            settings: Settings::default(),
            strategy: Strategy::default(),
        };
        let hub = Hub::new();
        let service = Service::new(store, hub.clone(), options);
        let id = OperationId::trusted(ID);
        let (updates, mut stream) = mpsc::channel(4);

        let patience = LEAD_WAIT * 4;
        let end = timeout(patience, service.follow(&id, &updates)).await.expect("it ends");
        assert_eq!(end.unwrap_err().code(), tonic::Code::Unavailable);

        // It begins to lead a little later, and then stops.
        let lead = async {
            hub.publish(1, &World::default());
            let update = stream.recv().await.unwrap().unwrap();
            assert_eq!(update.state(), OperationState::Running);
            hub.rest();
        };
        let (end, ()) =
            timeout(patience, async { tokio::join!(service.follow(&id, &updates), lead) })
                .await
                .expect("it ends");
        assert_eq!(end.unwrap_err().code(), tonic::Code::Unavailable);
    }
}
