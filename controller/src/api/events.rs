//! `drover.v1.EventService`.

use std::pin::Pin;

use drover_proto::v1::event_service_server::EventService;
use drover_proto::v1::{Event, ListEventsRequest, ListEventsResponse, WatchEventsRequest};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::errors::{ahead, compacted};
use super::service::Service;
use super::{page, present, validate};
use crate::model::{CLUSTER_KEY, ClusterRecord, EventRecord};
use crate::store::{ChangeStream, Versioned, View};

const WATCH_QUEUE: usize = 64;

type Events = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

#[tonic::async_trait]
impl EventService for Service {
    type WatchEventsStream = Events;

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let request = request.into_inner();
        validate::subject("subject", &request.subject)?;
        let view = self.read().await?;
        let mut events = since(&view, 0, &request.subject);
        let skip = events.len().saturating_sub(page::size(request.page_size));
        events.drain(..skip);
        Ok(Response::new(ListEventsResponse { events, revision: view.revision() }))
    }

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Events>, Status> {
        let WatchEventsRequest { from_revision, subject } = request.into_inner();
        validate::subject("subject", &subject)?;
        let view = self.read().await?;
        let dropped = view
            .get::<ClusterRecord>(CLUSTER_KEY)
            .map_or(0, |row| row.value.events_dropped_revision);
        if from_revision != 0 && from_revision < dropped {
            return Err(compacted(from_revision, dropped));
        }
        if from_revision > view.revision() {
            return Err(ahead(from_revision, view.revision()));
        }
        let backlog = match from_revision {
            0 => Vec::new(),
            from => since(&view, from, &subject),
        };
        let changes = self
            .store
            .watch(view.revision())
            .map_err(|error| compacted(view.revision(), error.oldest))?;
        let (events, stream) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(send(backlog, changes, subject, events));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Events with a greater revision, in the order they were committed.
fn since(view: &View, revision: u64, subject: &str) -> Vec<Event> {
    let mut rows: Vec<Versioned<EventRecord>> = view
        .all::<EventRecord>()
        .filter(|row| row.create_revision > revision)
        .filter(|row| subject.is_empty() || row.value.subject == subject)
        .collect();
    // Stable: those of one transaction stay in the order of their keys.
    rows.sort_by_key(|row| row.create_revision);
    rows.iter().map(present::event).collect()
}

/// A slow reader is not waited for: the store keeps the history, up to a point.
async fn send(
    backlog: Vec<Event>,
    mut changes: ChangeStream,
    subject: String,
    events: mpsc::Sender<Result<Event, Status>>,
) {
    for event in backlog {
        if events.send(Ok(event)).await.is_err() {
            return;
        }
    }
    loop {
        let set = tokio::select! {
            set = changes.next() => set,
            () = events.closed() => return,
        };
        let set = match set {
            Ok(set) => set,
            Err(error) => {
                let status = Status::unavailable(format!("watch again: {error}"));
                // The reader may be gone.
                let _ = events.send(Err(status)).await;
                return;
            }
        };
        let rows = set.changes.iter().filter_map(crate::store::Change::record::<EventRecord>);
        for value in rows.filter(|row| subject.is_empty() || row.subject == subject) {
            let revision = set.revision;
            let row = Versioned { value, create_revision: revision, mod_revision: revision };
            if events.send(Ok(present::event(&row))).await.is_err() {
                return;
            }
        }
    }
}
