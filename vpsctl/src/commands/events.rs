//! `vpsctl events`: what happened, and what comes.

use std::time::Duration;

use drover_proto::v1::{
    Event, ListEventsRequest, WatchEventsRequest, event_service_client::EventServiceClient,
};
use tokio_stream::StreamExt;

use super::{Context, call};
use crate::{
    args::EventsArgs,
    error::Error,
    out::{human::time, json, pages},
    wait::interrupts,
};

const REOPEN_PAUSE: Duration = Duration::from_millis(300);
/// What is kept is read within this time.
const KEPT_TIME_MAX: Duration = Duration::from_secs(120);

pub(super) async fn run(context: &Context, args: &EventsArgs) -> Result<(), Error> {
    let subject = args.subject.clone().unwrap_or_default();
    match (args.since, args.follow) {
        (None, follow) => {
            let request = ListEventsRequest { page_size: args.limit, subject: subject.clone() };
            let newest = call!(context, EventServiceClient::list_events, request)?;
            for event in &newest.events {
                show(context, event)?;
            }
            let from = Cursor { revision: newest.revision, seen: Vec::new() };
            if follow { until_interrupted(context, from, subject).await } else { Ok(()) }
        }
        (Some(since), true) => {
            until_interrupted(context, Cursor { revision: since, seen: Vec::new() }, subject).await
        }
        (Some(since), false) => kept_since(context, since, subject).await,
    }
}

fn show(context: &Context, event: &Event) -> Result<(), Error> {
    context.answer(|| json::line(event), || pages::event(event))
}

/// The events after a revision, up to the newest there is now.
async fn kept_since(context: &Context, since: u64, subject: String) -> Result<(), Error> {
    let request = ListEventsRequest { page_size: 1, subject: subject.clone() };
    let newest = call!(context, EventServiceClient::list_events, request)?;
    let Some(last) = newest.events.last() else { return Ok(()) };
    if last.revision <= since {
        return Ok(());
    }
    let mut cursor = Cursor { revision: since, seen: Vec::new() };
    tokio::select! {
        end = follow(context, &mut cursor, &subject, Some(last)) => end,
        () = context.cluster.deadline_passed() => Err(Error::TimeoutFollowing("--timeout".into())),
        () = tokio::time::sleep(KEPT_TIME_MAX) => Err(Error::TimeoutFollowing(time(KEPT_TIME_MAX))),
    }
}

async fn until_interrupted(
    context: &Context,
    mut cursor: Cursor,
    subject: String,
) -> Result<(), Error> {
    let started = tokio::time::Instant::now();
    let mut interrupt = interrupts()?;
    tokio::select! {
        end = follow(context, &mut cursor, &subject, None) => end,
        // The way to end it: not an error, and nothing goes on.
        _ = interrupt.recv() => Ok(()),
        () = context.cluster.deadline_passed() => {
            Err(Error::TimeoutFollowing(time(started.elapsed())))
        }
    }
}

/// Where a watch is, so that it goes on at the next member with nothing missed or shown twice:
/// one revision may carry several events, and a watch can break between them.
struct Cursor {
    revision: u64,
    /// Events of `revision` that were shown.
    seen: Vec<Event>,
}

impl Cursor {
    /// The revision to watch from: before the last one when part of it was seen.
    fn watch_from(&self) -> u64 {
        // 0 would mean: only what comes.
        if self.seen.is_empty() { self.revision } else { (self.revision - 1).max(1) }
    }

    /// Whether the event is new; notes it.
    fn advance(&mut self, event: &Event) -> bool {
        if event.revision > self.revision {
            self.revision = event.revision;
            self.seen.clear();
        }
        let new = event.revision == self.revision && !self.seen.contains(event);
        if new {
            self.seen.push(event.clone());
        }
        new
    }
}

/// Shows events until `last` has been shown, or for ever.
async fn follow(
    context: &Context,
    cursor: &mut Cursor,
    subject: &str,
    last: Option<&Event>,
) -> Result<(), Error> {
    loop {
        let request =
            WatchEventsRequest { from_revision: cursor.watch_from(), subject: subject.to_owned() };
        let mut events = context
            .cluster
            .call_again(|rpc| {
                let request = request.clone();
                async move { EventServiceClient::new(rpc).watch_events(request).await }
            })
            .await?;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) if cursor.advance(&event) => {
                    show(context, &event)?;
                    if last.is_some_and(|l| event == *l || event.revision > l.revision) {
                        return Ok(());
                    }
                }
                Ok(_) => {}
                Err(status) if context.cluster.turn_after(&status) => {
                    eprintln!("the controller that was watched is gone: asking the others");
                    break;
                }
                Err(status) => return Err(status.into()),
            }
        }
        tokio::time::sleep(REOPEN_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(revision: u64, reason: &str) -> Event {
        Event { revision, reason: reason.to_owned(), ..Event::default() }
    }

    /// A watch that broke between two events of one revision misses none and repeats none.
    #[test]
    fn a_cursor_resumes_within_a_revision() {
        let mut cursor = Cursor { revision: 5, seen: Vec::new() };
        assert_eq!(cursor.watch_from(), 5);
        assert!(cursor.advance(&event(7, "A")));
        assert_eq!(cursor.watch_from(), 6);
        assert!(!cursor.advance(&event(7, "A")), "sent again after the break");
        assert!(cursor.advance(&event(7, "B")));
        assert!(cursor.advance(&event(9, "A")));
        assert!(!cursor.advance(&event(7, "C")), "older than what was shown");
        assert_eq!(cursor.watch_from(), 8);
    }
}
