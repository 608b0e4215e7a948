//! The cluster as its members' addresses: a call goes to the member that answered last, and to
//! the next one when that cannot answer.
//!
//! What becomes an operation, and what makes or deletes a network or an image, carries a request id,
//! so that asking again after a lost answer is safe.

use std::{
    error::Error as _,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use drover_telemetry::TraceClient;
use tokio::time::Instant;
use tonic::{
    Code, Response, Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

use crate::error::Error;

/// A channel to one member, which carries the trace's context.
pub(crate) type Rpc = InterceptedService<Channel, TraceClient>;

/// How long to go on, and how long one member may take to answer before the next is asked.
#[derive(Clone, Copy)]
struct Patience {
    whole: Duration,
    attempt: Duration,
    /// Says when it waits.
    announce: bool,
}

const ATTEMPT_TIME_MAX: Duration = Duration::from_secs(10);
/// For an answer that a guest gives: a controller waits 30 s for it.
const GUEST_TIME_MAX: Duration = Duration::from_secs(40);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// A silent connection is found dead after twice this.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
pub(crate) use drover_proto::MESSAGE_BYTES_MAX;

/// How long a call goes round the members before it gives up: longer than an election.
const CALL_PATIENCE: Duration = Duration::from_secs(10);
/// The same for what has been running for a while: it outlives a rolling restart.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(60);
const ROUND_PAUSE: Duration = Duration::from_millis(300);

/// The members, and the patience that the command line asked for.
pub(crate) struct Cluster {
    members: Vec<(String, Channel)>,
    current: AtomicUsize,
    deadline: Option<Instant>,
}

impl Cluster {
    /// Connects to nobody yet. Needs a tokio runtime.
    pub(crate) fn new(servers: &[String], timeout: Option<Duration>) -> Result<Self, Error> {
        let mut members = Vec::new();
        for server in servers {
            let endpoint = Endpoint::from_shared(format!("http://{server}"))
                .map_err(|e| Error::Local(format!("server: \"{server}\": {e}")))?
                .connect_timeout(CONNECT_TIME_MAX)
                .http2_keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true);
            members.push((server.clone(), endpoint.connect_lazy()));
        }
        let deadline = timeout.map(|t| Instant::now() + t);
        Ok(Self { members, current: AtomicUsize::new(0), deadline })
    }

    /// The same members with other patience: what is left over is taken away also when `--timeout`
    /// has passed.
    pub(crate) fn for_clean_up(&self, time_max: Duration) -> Self {
        Self {
            members: self.members.clone(),
            current: AtomicUsize::new(self.current.load(Ordering::Relaxed)),
            deadline: Some(Instant::now() + time_max),
        }
    }

    /// Returns at `--timeout`, or never.
    pub(crate) async fn deadline_passed(&self) {
        match self.deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    }

    /// Calls one member after the other until one answers.
    ///
    /// # Errors
    /// What the controller refused, or `Unavailable` when nobody answered in time.
    pub(crate) async fn call<T, F, R>(&self, call: F) -> Result<T, Error>
    where
        F: Fn(Rpc) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = ATTEMPT_TIME_MAX;
        self.call_for(Patience { whole: CALL_PATIENCE, attempt, announce: true }, call).await
    }

    /// The same for what waits for a guest.
    pub(crate) async fn call_guest<T, F, R>(&self, call: F) -> Result<T, Error>
    where
        F: Fn(Rpc) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = GUEST_TIME_MAX;
        self.call_for(Patience { whole: GUEST_TIME_MAX, attempt, announce: true }, call).await
    }

    /// The same with more patience and in silence: for work that is already under way, and
    /// whose display is the caller's.
    pub(crate) async fn call_again<T, F, R>(&self, call: F) -> Result<T, Error>
    where
        F: Fn(Rpc) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = ATTEMPT_TIME_MAX;
        self.call_for(Patience { whole: FOLLOW_PATIENCE, attempt, announce: false }, call).await
    }

    async fn call_for<T, F, R>(&self, patience: Patience, call: F) -> Result<T, Error>
    where
        F: Fn(Rpc) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let mut until = Instant::now() + patience.whole;
        if let Some(deadline) = self.deadline {
            until = until.min(deadline);
        }
        let mut attempts = 0;
        loop {
            let index = self.current.load(Ordering::Relaxed);
            let (server, channel) = &self.members[index];
            let rpc = InterceptedService::new(channel.clone(), TraceClient);
            let attempt_end = (Instant::now() + patience.attempt).min(until);
            let reason = match tokio::time::timeout_at(attempt_end, call(rpc)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) if !another_may_answer(&status) => return Err(status.into()),
                Ok(Err(status)) => format!("{server}: {}", root_cause(&status)),
                Err(_) => format!("{server}: no answer in time"),
            };
            tracing::debug!(%reason, "asking the next member");
            self.turn_from(index);
            attempts += 1;
            if attempts % self.members.len() == 0 {
                if patience.announce && attempts == self.members.len() {
                    let seconds = until.saturating_duration_since(Instant::now()).as_secs();
                    eprintln!("waiting for a controller ({reason}), {seconds} s at most");
                }
                tokio::time::sleep_until((Instant::now() + ROUND_PAUSE).min(until)).await;
            }
            if Instant::now() >= until {
                return Err(Error::Unavailable { reason });
            }
        }
    }

    /// The next call goes to another member, unless somebody has turned already.
    fn turn_from(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// A stream broke: whether it is worth to open it again, at the next member.
    pub(crate) fn turn_after(&self, status: &Status) -> bool {
        let again = another_may_answer(status);
        if again {
            self.turn_from(self.current.load(Ordering::Relaxed));
        }
        again
    }
}

/// The member is gone or has no leader; or the connection broke, which tonic reports as a status
/// that has a source.
fn another_may_answer(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable => true,
        Code::Unknown | Code::Cancelled | Code::Internal => status.source().is_some(),
        _ => false,
    }
}

/// "transport error" says little; what lies below it says "connection refused".
pub(crate) fn root_cause(status: &Status) -> String {
    let mut cause = status.source();
    while let Some(below) = cause.and_then(|e| e.source()) {
        cause = Some(below);
    }
    cause.map_or_else(|| status.message().to_owned(), ToString::to_string)
}
