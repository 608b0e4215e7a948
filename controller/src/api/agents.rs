//! Calls from the leader to one node's agent.

use std::time::Duration;

use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const CONNECT_WAIT: Duration = Duration::from_secs(3);
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A connection to the agent at `address`, `host:port`.
///
/// # Errors
/// UNAVAILABLE: it cannot be reached.
pub(super) async fn connect(address: &str) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| Status::unavailable(format!("the agent's address {address}: {e}")))?
        .connect_timeout(CONNECT_WAIT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .tcp_nodelay(true);
    endpoint.connect().await.map_err(|error| {
        Status::unavailable(format!("the agent at {address} cannot be reached: {error}"))
    })
}
