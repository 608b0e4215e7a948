//! What a node shall run: derived from the rows each time, so that it cannot drift from them.

use std::collections::BTreeMap;

use drover_proto::agent::v1::assignment::Role;
use drover_proto::agent::v1::{Assignment, Incoming, Outgoing, Owner};
use drover_proto::v1::{DomainSpec, DomainState};

use crate::model::{DomainRecord, Migration, MigrationStage, NodeId, World};

/// Everything that shall be on the node, by the domains' ids. What is not listed is ended there.
#[must_use]
pub fn desired(world: &World, node: &NodeId) -> Vec<Assignment> {
    world.concerning(node).filter_map(|row| assignment(&row.value, node.as_str())).collect()
}

/// What one node shall do about a domain; None when it shall have nothing of it.
#[must_use]
pub fn assignment(domain: &DomainRecord, node: &str) -> Option<Assignment> {
    if domain.state() == DomainState::Deleting {
        return None;
    }
    let Some(m) = &domain.migration else {
        return (domain.node == node).then(|| assign(domain, domain.epoch, owner(domain), None));
    };
    if m.from == node {
        return Some(assign(domain, m.from_epoch, owner(domain), outgoing(m)));
    }
    if m.to != node {
        return None;
    }
    Some(match m.stage() {
        MigrationStage::Granted => assign(domain, m.granted_epoch, owner(domain), None),
        MigrationStage::Settling => assign(domain, domain.epoch, owner(domain), None),
        _ => {
            let incoming = Incoming { migration_id: m.id.clone(), token: m.token.clone() };
            assign(domain, m.to_epoch, Role::Incoming(incoming), None)
        }
    })
}

fn owner(domain: &DomainRecord) -> Role {
    Role::Owner(Owner {
        power: domain.desired_power,
        grace_period: Some(duration(domain.grace_ms)),
        start_generation: domain.start_generation,
    })
}

/// Not before the destination listens; from then on the same until the end, so that an agent
/// that comes late knows what its VMM was told.
fn outgoing(m: &Migration) -> Option<Outgoing> {
    (m.stage() != MigrationStage::Preparing).then(|| Outgoing {
        migration_id: m.id.clone(),
        address: m.address.clone(),
        token: m.token.clone(),
        to_epoch: m.to_epoch,
        limits: m.limits,
        cancel: m.stage() == MigrationStage::Cancelling,
    })
}

fn assign(domain: &DomainRecord, epoch: u64, role: Role, outgoing: Option<Outgoing>) -> Assignment {
    // Labels are for people and billing: no node needs them.
    let spec = domain.spec.clone().map(|spec| DomainSpec { labels: BTreeMap::new(), ..spec });
    Assignment {
        uid: domain.uid.clone(),
        name: format!("domains/{}", domain.id),
        epoch,
        spec,
        outgoing,
        role: Some(role),
        disks: Vec::new(),
    }
}

/// Milliseconds as protobuf has them.
#[must_use]
pub fn duration(ms: u64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or(0),
    }
}
