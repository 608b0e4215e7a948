//! One session, from Hello to its end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::agent::v1::session_service_server::SessionService;
use drover_proto::agent::v1::{
    AgentMessage, ControllerMessage, Desired, Hello, Report, Welcome, agent_message,
    controller_message,
};
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, info, info_span};

use super::hello;
use super::hub::{Hub, Lead, Seat};
use crate::api::Service;
use crate::api::errors::{Fault, not_leading};
use crate::model::{NodeId, World};
use crate::store::{Leadership, Revision};
use crate::workflows::desired::{Level, desired, duration};
use crate::workflows::nodes;

/// Hello must come within this, and be taken in within this.
const HELLO_WAIT: Duration = Duration::from_secs(10);
/// An agent that takes nothing for so long is not there.
const SEND_WAIT: Duration = Duration::from_secs(10);
/// Messages to an agent that are on their way.
const QUEUE: usize = 4;
/// Levels that an agent has been sent and not yet taken in.
const UNANSWERED_MAX: usize = 256;

/// `drover.agent.v1.SessionService`.
#[derive(Clone)]
pub struct Sessions {
    service: Service,
}

type Messages = Pin<Box<dyn Stream<Item = Result<ControllerMessage, Status>> + Send>>;

impl Sessions {
    /// Serves sessions while this member leads.
    #[must_use]
    pub fn new(service: Service) -> Self {
        Self { service }
    }

    /// Writes down what Hello says; the revision from which on the rows know it.
    async fn register(&self, node: &NodeId, hello: &Hello) -> Result<Revision, Status> {
        let deadline = Instant::now() + HELLO_WAIT;
        self.service
            .decide(deadline, |cx, _| {
                Ok::<_, Fault>((nodes::register(cx, node, hello)?.unwrap_or_default(), ()))
            })
            .await
            .map(|(revision, ())| revision)
            .map_err(Status::from)
    }
}

#[tonic::async_trait]
impl SessionService for Sessions {
    type OpenSessionStream = Messages;

    async fn open_session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Messages>, Status> {
        let leadership = self.service.store.leadership().borrow().clone();
        if !leadership.is_leader {
            return Err(not_leading(leadership.leader_address.as_deref()));
        }
        let mut inbound = request.into_inner();
        let first = timeout(HELLO_WAIT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("Hello did not come within 10 s"))??;
        let Some(agent_message::Message::Hello(hello)) = first.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument("message: the first message must be hello"));
        };
        let node = hello::check(&hello, &self.service.cluster_id)?;
        let revision = self.register(&node, &hello).await?;

        let hub = self.service.hub.clone();
        let lead = world_at(&hub, leadership.term, revision).await?;
        let seat = hub.sit(&node, &hello.boot_id);
        let (outbound, messages) = mpsc::channel(QUEUE);
        let settings = self.service.settings;
        let welcome = Welcome {
            leader_id: self.service.member,
            term: leadership.term,
            report_interval: Some(duration(settings.report_interval_ms)),
            lease: Some(duration(settings.lease_ms)),
        };
        let session = Session {
            seat,
            node: node.clone(),
            term: leadership.term,
            silence_max: Duration::from_millis(settings.lease_ms),
            leadership: self.service.store.leadership(),
            outbound,
            levels: Levels::default(),
        };
        let span = info_span!(parent: None, "session", node = node.as_str());
        tokio::spawn(session.run(inbound, lead, welcome).instrument(span));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

/// Waits until the workflows have seen the revision, in this term.
async fn world_at(
    hub: &Arc<Hub>,
    term: u64,
    revision: Revision,
) -> Result<watch::Receiver<Option<Lead>>, Status> {
    let mut lead = hub.lead();
    let seen = lead.wait_for(|lead| {
        lead.as_ref().is_some_and(|lead| lead.term == term && lead.world.revision >= revision)
    });
    match timeout(HELLO_WAIT, seen).await {
        Ok(Ok(_)) => {}
        _ => return Err(not_leading(None)),
    }
    Ok(lead)
}

struct Session {
    seat: Seat,
    node: NodeId,
    term: u64,
    /// Longer without a report, and the session is taken to be dead.
    silence_max: Duration,
    /// Watched here, too: the workflows may be busy when leadership moves.
    leadership: watch::Receiver<Leadership>,
    outbound: mpsc::Sender<Result<ControllerMessage, Status>>,
    levels: Levels,
}

impl Session {
    async fn run(
        mut self,
        mut inbound: Streaming<AgentMessage>,
        mut lead: watch::Receiver<Option<Lead>>,
        welcome: Welcome,
    ) {
        info!("opens");
        let end = self.serve(&mut inbound, &mut lead, welcome).await.err();
        info!(reason = end.as_ref().map_or("the agent has left", |s| s.message()), "ends");
        if let Some(status) = end {
            // The agent may be gone: then nobody needs to be told.
            let _ = timeout(SEND_WAIT, self.outbound.send(Err(status))).await;
        }
    }

    async fn serve(
        &mut self,
        inbound: &mut Streaming<AgentMessage>,
        lead: &mut watch::Receiver<Option<Lead>>,
        welcome: Welcome,
    ) -> Result<(), Status> {
        self.check_leadership()?;
        self.send(controller_message::Message::Welcome(welcome)).await?;
        self.tell(lead).await?;
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                message = inbound.message() => match message? {
                    None => return Ok(()),
                    Some(message) => {
                        heard = Instant::now();
                        self.take(message)?;
                    }
                },
                changed = lead.changed() => {
                    changed.map_err(|_| not_leading(None))?;
                    self.tell(lead).await?;
                }
                changed = self.leadership.changed() => {
                    changed.map_err(|_| not_leading(None))?;
                    self.check_leadership()?;
                }
                _ = self.seat.replaced.changed() => {
                    return Err(Status::aborted("a newer session of this node has taken over"));
                }
                () = tokio::time::sleep_until(heard + self.silence_max) => {
                    return Err(Status::deadline_exceeded("no report for a lease"));
                }
            }
        }
    }

    fn check_leadership(&mut self) -> Result<(), Status> {
        let held = self.leadership.borrow_and_update();
        if held.is_leader && held.term == self.term {
            return Ok(());
        }
        Err(not_leading(held.leader_address.as_deref()))
    }

    fn take(&mut self, message: AgentMessage) -> Result<(), Status> {
        match message.message {
            Some(agent_message::Message::Report(report)) => {
                let taken_in = self.levels.taken_in(&report);
                self.seat.report(report, taken_in);
                Ok(())
            }
            Some(agent_message::Message::Hello(_)) => {
                Err(Status::invalid_argument("message: hello comes once, as the first message"))
            }
            // Newer than this controller: nothing that it would have to know.
            None => Ok(()),
        }
    }

    /// Sends what shall be on the node, when that has changed.
    async fn tell(&mut self, lead: &mut watch::Receiver<Option<Lead>>) -> Result<(), Status> {
        let held = lead.borrow_and_update().clone();
        let Some(held) = held.filter(|held| held.term == self.term) else {
            return Err(not_leading(None));
        };
        match self.levels.next(&held.world, &self.node) {
            Some((sequence, level)) => {
                let Level { domains, volumes, garbage, snapshots } = level;
                let desired =
                    Desired { term: self.term, sequence, domains, volumes, garbage, snapshots };
                self.send(controller_message::Message::Desired(desired)).await
            }
            None => {
                self.seat.still_knows(self.levels.known());
                Ok(())
            }
        }
    }

    async fn send(&self, message: controller_message::Message) -> Result<(), Status> {
        let message = ControllerMessage { message: Some(message) };
        match timeout(SEND_WAIT, self.outbound.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the agent has left")),
            Err(_) => Err(Status::deadline_exceeded("the agent takes nothing")),
        }
    }
}

/// Which level was sent as which sequence, and the newest revision at which it was still so.
#[derive(Default)]
struct Levels {
    last: Option<Level>,
    sequence: u64,
    sent: VecDeque<(u64, Revision)>,
    answered: u64,
}

impl Levels {
    /// The level at the world's revision, if it is not the last one sent.
    fn next(&mut self, world: &World, node: &NodeId) -> Option<(u64, Level)> {
        let level = desired(world, node);
        if self.last.as_ref() == Some(&level) {
            if let Some(last) = self.sent.back_mut() {
                last.1 = world.revision;
            }
            return None;
        }
        self.sequence += 1;
        self.last = Some(level.clone());
        self.sent.push_back((self.sequence, world.revision));
        if self.sent.len() > UNANSWERED_MAX {
            self.sent.pop_front();
        }
        Some((self.sequence, level))
    }

    /// The revision that a report knows.
    fn taken_in(&mut self, report: &Report) -> Revision {
        self.answered = report.desired_sequence;
        while self.sent.front().is_some_and(|(sequence, _)| *sequence < self.answered) {
            self.sent.pop_front();
        }
        self.known()
    }

    /// The newest revision whose level the agent has taken in; 0 when none.
    fn known(&self) -> Revision {
        let first = self.sent.front();
        first
            .filter(|(sequence, _)| *sequence == self.answered)
            .map_or(0, |(_, revision)| *revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row that is written without changing the node's level must not make the agent's
    /// answer look old: it would never be renewed.
    #[test]
    fn an_unchanged_level_is_known_at_the_newer_revision() {
        let node = NodeId::parse("host1").unwrap();
        let mut levels = Levels::default();
        let world = |revision| {
            let mut world = World::default();
            world.revision = revision;
            world
        };
        assert_eq!(levels.next(&world(5), &node).map(|(sequence, _)| sequence), Some(1));
        assert_eq!(levels.known(), 0);
        let report = Report { desired_sequence: 1, ..Report::default() };
        assert_eq!(levels.taken_in(&report), 5);
        assert!(levels.next(&world(9), &node).is_none());
        assert_eq!(levels.known(), 9);
        let stale = Report { desired_sequence: 0, ..Report::default() };
        assert_eq!(levels.taken_in(&stale), 0);
    }
}
