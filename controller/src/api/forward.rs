//! Any member answers any call: one that does not lead sends it on, as it came.
//!
//! The HTTP/2 request goes to the leader's channel untouched (streams in both directions
//! included) with two headers: the trace it belongs to, and one for which it is sent on once at
//! most. When no leader is known, the call waits a little for an election to end.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{HeaderValue, Request, Response};
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::transport::{Channel, Endpoint};
use tower::{Service, ServiceExt};
use tracing::debug;

use super::errors::not_leading;
use crate::store::{Leadership, MemberId, Store};

/// Set on a request that was sent on: by which member.
const FORWARDED_BY: &str = "drover-forwarded-by";
/// An election takes about a second.
const LEADER_WAIT: Duration = Duration::from_secs(5);
const CONNECT_WAIT: Duration = Duration::from_secs(2);
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Answered by the member that is asked, whoever leads.
const LOCAL: [&str; 1] = ["/drover.v1.ClusterService/GetStatus"];

/// Finds the leader and keeps a channel to it.
#[derive(Clone)]
pub(super) struct Forwarder {
    store: Store,
    member: MemberId,
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
}

/// A service whose calls run on the leader.
#[derive(Clone)]
pub(super) struct Forward<S> {
    inner: S,
    forwarder: Forwarder,
}

impl Forwarder {
    pub(super) fn new(store: Store, member: MemberId) -> Self {
        Self { store, member, channels: Arc::default() }
    }

    pub(super) fn wrap<S>(&self, inner: S) -> Forward<S> {
        Forward { inner, forwarder: self.clone() }
    }

    /// This member, when it leads; the leader's channel otherwise.
    async fn target(&self, forwarded: bool) -> Result<Option<Channel>, Status> {
        let mut leadership = self.store.leadership();
        let known = |held: &Leadership| {
            held.is_leader || held.leader.is_some_and(|leader| leader != self.member)
        };
        let held = match timeout(LEADER_WAIT, leadership.wait_for(known)).await {
            Ok(Ok(held)) => held.clone(),
            _ => {
                return Err(Status::unavailable(format!(
                    "no controller leads; waited {} s for an election",
                    LEADER_WAIT.as_secs()
                )));
            }
        };
        if held.is_leader {
            return Ok(None);
        }
        let address = held.leader_address.as_deref();
        if forwarded {
            return Err(not_leading(address));
        }
        match address {
            Some(address) => self.channel(address).map(Some),
            None => Err(not_leading(None)),
        }
    }

    fn channel(&self, address: &str) -> Result<Channel, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| Status::unavailable(format!("the leader's address {address}: {e}")))?
            .connect_timeout(CONNECT_WAIT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let channel = endpoint.connect_lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    async fn send(&self, channel: Channel, mut request: Request<Body>) -> Response<Body> {
        let mut metadata = MetadataMap::from_headers(std::mem::take(request.headers_mut()));
        drover_telemetry::inject(&mut metadata);
        *request.headers_mut() = metadata.into_headers();
        request.headers_mut().insert(FORWARDED_BY, HeaderValue::from(self.member));
        let sent = match ServiceExt::<Request<Body>>::ready_oneshot(channel).await {
            Ok(mut channel) => channel.call(request).await,
            Err(error) => Err(error),
        };
        sent.unwrap_or_else(|error| {
            debug!(%error, "the leader did not take a call");
            Status::unavailable(format!("the leader did not answer: {error}")).into_http()
        })
    }
}

impl<S> Service<Request<Body>> for Forward<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The clone left behind is the one that was not polled ready.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        if LOCAL.contains(&request.uri().path()) {
            return Box::pin(inner.call(request));
        }
        let forwarder = self.forwarder.clone();
        Box::pin(async move {
            let forwarded = request.headers().contains_key(FORWARDED_BY);
            match forwarder.target(forwarded).await {
                Ok(None) => inner.call(request).await,
                Ok(Some(leader)) => Ok(forwarder.send(leader, request).await),
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}

impl<S: NamedService> NamedService for Forward<S> {
    const NAME: &'static str = S::NAME;
}
