//! `drover.v1.OperationService`.

use std::pin::Pin;
use std::time::Duration;

use drover_proto::v1::operation_service_server::OperationService;
use drover_proto::v1::{
    CancelOperationRequest, GetOperationRequest, ListOperationsRequest, ListOperationsResponse,
    Operation, OperationState, WaitOperationRequest,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::errors::{Fault, not_leading};
use super::service::{CALL_WAIT, Service};
use super::{page, present, validate};
use crate::model::{OperationId, OperationRecord, is_active};
use crate::store::{Versioned, View};
use crate::workflows::Refusal;
use crate::workflows::begin::cancel_operation;

const WAIT_MAX: Duration = Duration::from_secs(600);
/// Progress alone is sent no faster than this.
const WATCH_PACE: Duration = Duration::from_millis(200);
const WATCH_QUEUE: usize = 4;

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
        loop {
            lead.borrow_and_update();
            let view = self.read().await?;
            let row = known(&view, &id)?;
            let now = present::operation(&row, &view, &self.hub.observed());
            if is_done(&now) {
                return Ok(Response::new(now));
            }
            match timeout_at(deadline, lead.changed()).await {
                Err(_) => return Ok(Response::new(now)),
                Ok(Err(_)) => return Err(not_leading(None)),
                Ok(Ok(())) if lead.borrow().is_none() => return Err(not_leading(None)),
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
        loop {
            lead.borrow_and_update();
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
                changed = lead.changed() => {
                    if changed.is_err() || lead.borrow().is_none() {
                        return Err(not_leading(None));
                    }
                }
                _ = reports.changed() => sleep(WATCH_PACE).await,
            }
        }
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
