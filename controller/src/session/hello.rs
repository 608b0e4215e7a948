//! The first message of an agent: checked whole before anything is changed.

use drover_proto::agent::v1::Hello;
use tonic::Status;

use crate::api::errors::invalid;
use crate::model::{NodeId, is_request_id};
use crate::workflows::Refusal;

/// Checks what can be checked without the store.
///
/// # Errors
/// Names the field and what is accepted.
pub(super) fn check(hello: &Hello, cluster_id: &str) -> Result<NodeId, Status> {
    if hello.cluster_id != cluster_id {
        return Err(Refusal::Precondition {
            subject: "cluster".into(),
            reason: "CLUSTER_ID_MISMATCH",
            message: format!(
                "cluster_id: {:?} is not accepted: this is cluster {cluster_id:?}. Start \
                 drover-agent with --cluster-id {cluster_id}, or point it at its own controllers",
                hello.cluster_id
            ),
        }
        .into());
    }
    let node = NodeId::from_name(&hello.node)
        .map_err(|bad| Status::from(invalid("node", &bad.value, &bad.expected)))?;
    if !is_request_id(&hello.node_uid) {
        return Err(invalid("node_uid", &hello.node_uid, "a UUID, kept on the node's disk").into());
    }
    if hello.boot_id.is_empty() {
        let expected = "the content of /proc/sys/kernel/random/boot_id";
        return Err(invalid("boot_id", "", expected).into());
    }
    let port = hello
        .address
        .rsplit_once(':')
        .and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>().ok()).flatten());
    if port.is_none_or(|port| port == 0) {
        let expected = "host:port at which AgentService is reached";
        return Err(invalid("address", &hello.address, expected).into());
    }
    let capacity = hello.capacity.unwrap_or_default();
    if capacity.vcpus == 0 || capacity.memory_bytes == 0 {
        let given = format!("{} vCPUs, {} bytes", capacity.vcpus, capacity.memory_bytes);
        return Err(invalid("capacity", &given, "more than zero of both").into());
    }
    Ok(node)
}
