//! All rows that work is decided from, typed and indexed.

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::agent::v1::ObservedPool;
use drover_proto::v1::{
    Disk, DomainState, DrainPolicy, DrainState, NodeState, PoolState, VolumeState,
};

use super::by_node::ByNode;
use super::records::{self, needs};
use super::{
    ClusterRecord, DomainId, DomainRecord, GarbageRecord, ImageRecord, NetworkRecord, NodeId,
    NodeObservation, NodeRecord, Observed, OperationId, OperationRecord, SnapshotRecord,
    VolumeRecord,
};
use crate::scheduler::{
    ClusterView, DomainView, LINK_BYTES_PER_SECOND, Mobility, NodeView, Origin, PoolNeeds,
    PoolView, Resources, stays_behind,
};
use crate::store::{ChangeSet, Record, Versioned, View};

/// What is in a shared pool, or is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promised {
    /// What its volumes may grow to.
    pub bytes: u64,
    /// How many there are.
    pub volumes: u32,
}

/// The cluster at one revision. Finished operations and events are not here.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// The revision.
    pub revision: u64,
    /// All nodes.
    pub nodes: BTreeMap<NodeId, Versioned<NodeRecord>>,
    /// All domains.
    pub domains: BTreeMap<DomainId, Versioned<DomainRecord>>,
    /// Operations that have not ended.
    pub operations: BTreeMap<OperationId, Versioned<OperationRecord>>,
    /// The ended ones among the moves of a drain or balance that has not ended.
    ended_moves: BTreeMap<OperationId, Versioned<OperationRecord>>,
    /// The row of the cluster as a whole; absent until it is first needed.
    pub cluster: Option<Versioned<ClusterRecord>>,
    /// All volumes, by id.
    pub volumes: BTreeMap<String, Versioned<VolumeRecord>>,
    /// All images, by id.
    pub images: BTreeMap<String, Versioned<ImageRecord>>,
    /// What nodes shall remove, by `{node}/{what}`.
    pub garbage: BTreeMap<String, Versioned<GarbageRecord>>,
    /// All networks, by id.
    pub networks: BTreeMap<String, Versioned<NetworkRecord>>,
    /// All snapshots, by id.
    pub snapshots: BTreeMap<String, Versioned<SnapshotRecord>>,
    /// Volumes that no domain has.
    left: ByNode,
    snapshots_by_node: ByNode,
    /// The domains that concern a node: owned, coming, leaving.
    by_node: BTreeMap<NodeId, BTreeSet<DomainId>>,
}

impl World {
    /// Reads everything.
    #[must_use]
    pub fn load(view: &View) -> Self {
        let mut world = Self { revision: view.revision(), ..Self::default() };
        for row in view.all::<NodeRecord>() {
            world.nodes.insert(records::node_id(&row.value), row);
        }
        for row in view.all::<DomainRecord>() {
            world.put_domain(row);
        }
        for row in view.all::<OperationRecord>() {
            world.put_operation(row);
        }
        world.forget_ended_moves();
        world.cluster = view.get(super::CLUSTER_KEY);
        world.volumes = by_key(view.all());
        world.images = by_key(view.all());
        world.garbage = by_key(view.all());
        world.networks = by_key(view.all());
        world.snapshots = by_key(view.all());
        let left = world.volumes.iter().map(|(id, row)| (row.value.node.as_str(), id));
        world.left = ByNode::of(left);
        let snapshots = world.snapshots.iter().map(|(id, row)| (row.value.node.as_str(), id));
        world.snapshots_by_node = ByNode::of(snapshots);
        world
    }

    /// Takes in what one revision changed. `set` must be the next one.
    pub fn apply(&mut self, set: &ChangeSet) {
        for change in &set.changes {
            if change.is::<NodeRecord>() {
                let held = self.nodes.remove(&NodeId::trusted(&change.key));
                if let Some(row) = versioned(change.record(), held, set.revision) {
                    self.nodes.insert(records::node_id(&row.value), row);
                }
            } else if change.is::<DomainRecord>() {
                let held = self.remove_domain(&DomainId::trusted(&change.key));
                if let Some(row) = versioned(change.record(), held, set.revision) {
                    self.put_domain(row);
                }
            } else if change.is::<OperationRecord>() {
                let id = OperationId::trusted(&change.key);
                let held = self.operations.remove(&id);
                self.ended_moves.remove(&id);
                if let Some(row) = versioned(change.record(), held, set.revision) {
                    let ended = !records::is_active(&row.value);
                    let is_parent = ended && !row.value.moves.is_empty();
                    self.put_operation(row);
                    if is_parent {
                        self.forget_ended_moves();
                    }
                }
            } else if change.is::<ClusterRecord>() {
                let held = self.cluster.take();
                self.cluster = versioned(change.record(), held, set.revision);
            } else if change.is::<VolumeRecord>() {
                let node = |row: &VolumeRecord| row.node.clone();
                let (rows, index) = (&mut self.volumes, &mut self.left);
                replace_on(rows, index, node, &change.key, change.record(), set.revision);
            } else if change.is::<SnapshotRecord>() {
                let node = |row: &SnapshotRecord| row.node.clone();
                let (rows, index) = (&mut self.snapshots, &mut self.snapshots_by_node);
                replace_on(rows, index, node, &change.key, change.record(), set.revision);
            } else if change.is::<ImageRecord>() {
                replace(&mut self.images, &change.key, change.record(), set.revision);
            } else if change.is::<GarbageRecord>() {
                replace(&mut self.garbage, &change.key, change.record(), set.revision);
            } else if change.is::<NetworkRecord>() {
                replace(&mut self.networks, &change.key, change.record(), set.revision);
            }
        }
        self.revision = set.revision;
    }

    /// An operation that has not ended, or a move of one that has not.
    #[must_use]
    pub fn operation(&self, id: &OperationId) -> Option<&OperationRecord> {
        self.operations.get(id).or_else(|| self.ended_moves.get(id)).map(|row| &row.value)
    }

    /// The domains that a node owns, or that come to it or leave it.
    pub fn concerning(&self, node: &NodeId) -> impl Iterator<Item = &Versioned<DomainRecord>> {
        self.by_node.get(node).into_iter().flatten().filter_map(|id| self.domains.get(id))
    }

    /// The domains that a node owns.
    pub fn owned(&self, node: &NodeId) -> impl Iterator<Item = &Versioned<DomainRecord>> {
        self.concerning(node).filter(move |row| row.value.node == node.as_str())
    }

    /// A domain by its uid, looking only at those that concern the node.
    #[must_use]
    pub fn by_uid(&self, node: &NodeId, uid: &str) -> Option<&Versioned<DomainRecord>> {
        self.concerning(node).find(|row| row.value.uid == uid)
    }

    /// What is promised on a node: what it owns, and what comes or has not quite left.
    #[must_use]
    pub fn reserved(&self, node: &NodeId) -> Resources {
        self.concerning(node)
            .map(|row| needs(&row.value))
            .fold(Resources::default(), Resources::plus)
    }

    /// All of a domain's volumes: its disks in their order, and what its state is saved to.
    pub fn volumes_of<'a>(
        &'a self,
        domain: &'a DomainRecord,
    ) -> impl Iterator<Item = &'a Versioned<VolumeRecord>> {
        self.disks_of(domain).map(|(_, row)| row).chain(self.memory_of(domain))
    }

    /// A domain's disks, as its guest finds them: the rescue disk, if any, of which its spec says
    /// nothing, and its own.
    pub fn disks_of<'a>(
        &'a self,
        domain: &'a DomainRecord,
    ) -> impl Iterator<Item = (Option<&'a Disk>, &'a Versioned<VolumeRecord>)> {
        let own = domain.spec.iter().flat_map(|spec| &spec.disks);
        let own = own.filter_map(|disk| {
            let row = self.volumes.get(disk.volume.strip_prefix("volumes/")?)?;
            Some((Some(disk), row))
        });
        self.rescue_of(domain).map(|row| (None, row)).into_iter().chain(own)
    }

    /// What a domain is rescued with.
    #[must_use]
    pub fn rescue_of(&self, domain: &DomainRecord) -> Option<&Versioned<VolumeRecord>> {
        let volume = records::rescue_volume(&domain.id);
        records::is_rescued(domain).then(|| self.volumes.get(&volume)).flatten()
    }

    /// What a domain's state is saved to.
    #[must_use]
    pub fn memory_of(&self, domain: &DomainRecord) -> Option<&Versioned<VolumeRecord>> {
        self.volumes.get(&domain.memory_volume)
    }

    /// The volumes on a node that no domain has.
    pub fn left_on(&self, node: &NodeId) -> impl Iterator<Item = &Versioned<VolumeRecord>> {
        self.left.on(node).filter_map(|id| self.volumes.get(id))
    }

    /// The snapshots on a node, whosever they are.
    pub fn snapshots_on(&self, node: &NodeId) -> impl Iterator<Item = &Versioned<SnapshotRecord>> {
        self.snapshots_by_node.on(node).filter_map(|id| self.snapshots.get(id))
    }

    /// A domain's snapshots, on whatever node.
    pub fn snapshots_of<'a>(
        &'a self,
        domain: &'a DomainRecord,
    ) -> impl Iterator<Item = &'a Versioned<SnapshotRecord>> {
        self.snapshots.values().filter(|row| row.value.domain_uid == domain.uid)
    }

    /// What a move of the domain leaves on its node, for people; empty where it leaves nothing.
    #[must_use]
    pub fn stays_behind(&self, domain: &DomainRecord, from: &str, to: &str) -> String {
        let stays =
            |row: &&Versioned<SnapshotRecord>| !self.snapshot_is_shared(&row.value, from, to);
        stays_behind(self.snapshots_at(domain, from).filter(stays).count(), from)
    }

    /// The domain's snapshots that a move takes along, without moving them.
    pub fn goes_along<'a>(
        &'a self,
        domain: &'a DomainRecord,
        from: &'a str,
        to: &'a str,
    ) -> impl Iterator<Item = &'a Versioned<SnapshotRecord>> {
        self.snapshots_at(domain, from)
            .filter(move |row| self.snapshot_is_shared(&row.value, from, to))
    }

    fn snapshots_at<'a>(
        &'a self,
        domain: &'a DomainRecord,
        from: &str,
    ) -> impl Iterator<Item = &'a Versioned<SnapshotRecord>> {
        let node = NodeId::trusted(from);
        let uid = &domain.uid;
        let ids = self.snapshots_by_node.on(&node).cloned().collect::<Vec<_>>();
        let rows = ids.into_iter().filter_map(|id| self.snapshots.get(&id));
        rows.filter(move |row| row.value.domain_uid == *uid)
    }

    /// Whether both nodes have all parts of it.
    fn snapshot_is_shared(&self, snapshot: &SnapshotRecord, a: &str, b: &str) -> bool {
        snapshot.parts.iter().all(|part| self.is_shared(&part.pool, a, b))
    }

    /// Which pool the node's pool of this id is, where several share it; empty for its own.
    #[must_use]
    pub fn shared_uid(&self, node: &str, pool: &str) -> &str {
        let row = self.nodes.get(&NodeId::trusted(node));
        row.and_then(|row| row.value.shared_pools.get(pool)).map_or("", String::as_str)
    }

    /// Whether two nodes' pools of this id are one pool.
    #[must_use]
    pub fn is_shared(&self, pool: &str, a: &str, b: &str) -> bool {
        let uid = self.shared_uid(a, pool);
        !uid.is_empty() && uid == self.shared_uid(b, pool)
    }

    /// Where the domain's volumes lie, for a move.
    #[must_use]
    pub fn origin(&self, domain: &DomainRecord) -> Origin {
        let pools = self.volumes_of(domain).map(|row| row.value.pool.as_str());
        let shared = pools.filter_map(|pool| {
            let uid = self.shared_uid(&domain.node, pool);
            (!uid.is_empty()).then(|| (pool.to_owned(), uid.to_owned()))
        });
        Origin { shared: shared.collect(), live: !records::is_at_rest(domain) }
    }

    /// The nodes that share a pool, in their order.
    pub fn sharers<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = &'a NodeId> {
        let shares = move |row: &NodeRecord| row.shared_pools.values().any(|held| held == uid);
        self.nodes.iter().filter(move |(_, row)| shares(&row.value)).map(|(id, _)| id)
    }

    /// What is promised in shared pools, by what they are: each volume once, whoever shares it.
    #[must_use]
    pub fn promised_shared(&self) -> BTreeMap<String, Promised> {
        let mut sum = BTreeMap::new();
        if self.nodes.values().all(|row| row.value.shared_pools.is_empty()) {
            return sum;
        }
        let mut add = |volume: &VolumeRecord, nodes: &BTreeSet<NodeId>| {
            let uids = nodes.iter().map(|node| self.shared_uid(node.as_str(), &volume.pool));
            let uids: BTreeSet<&str> = uids.filter(|uid| !uid.is_empty()).collect();
            for uid in uids {
                let promised: &mut Promised = sum.entry(uid.to_owned()).or_default();
                promised.bytes += volume.size_bytes;
                promised.volumes += 1;
            }
        };
        for row in self.domains.values() {
            let nodes = nodes_of(&row.value);
            self.volumes_of(&row.value).for_each(|volume| add(&volume.value, &nodes));
        }
        for volume in self.volumes.values().map(|row| &row.value) {
            if !volume.node.is_empty() {
                add(volume, &BTreeSet::from([NodeId::trusted(&volume.node)]));
            }
        }
        sum
    }

    /// What the domain's volumes may grow to, by pool.
    #[must_use]
    pub fn pool_needs(&self, domain: &DomainRecord) -> PoolNeeds {
        let mut needs = PoolNeeds::new();
        for volume in self.volumes_of(domain).map(|row| &row.value) {
            *needs.entry(volume.pool.clone()).or_default() += volume.size_bytes;
        }
        needs
    }

    /// What a move copies of its volumes.
    fn disk_bytes(&self, domain: &DomainRecord, observed: &Observed) -> u64 {
        let of = |volume: &VolumeRecord| {
            let said = observed.volume(&domain.node, &volume.uid);
            let taken = said.map(|said| said.allocated_bytes).filter(|bytes| *bytes > 0);
            taken.map_or(volume.size_bytes, |bytes| bytes.min(volume.size_bytes))
        };
        self.volumes_of(domain).map(|row| of(&row.value)).fold(0, u64::saturating_add)
    }

    /// The first of its volumes that is not there to be copied.
    #[must_use]
    pub fn unready(&self, domain: &DomainRecord) -> Option<&VolumeRecord> {
        let ready = |row: &&Versioned<VolumeRecord>| row.value.state() != VolumeState::Ready;
        // The row's own lifetime, not the domain's.
        let id = self.volumes_of(domain).find(ready)?.value.id.clone();
        self.volumes.get(&id).map(|row| &row.value)
    }

    fn mobility(&self, domain: &DomainRecord) -> Mobility {
        mobility(domain, self.unready(domain))
    }

    /// What is promised in a node's own pools: to what it owns, to what comes or has not quite left,
    /// and to volumes that no domain has. Snapshots are promised nothing: nobody writes to them,
    /// and what they hold back from being freed shows in what their pool has in use.
    #[must_use]
    pub fn promised(&self, node: &NodeId) -> PoolNeeds {
        let mut sum = PoolNeeds::new();
        for row in self.concerning(node) {
            for (pool, bytes) in self.pool_needs(&row.value) {
                *sum.entry(pool).or_default() += bytes;
            }
        }
        for volume in self.left_on(node).map(|row| &row.value) {
            *sum.entry(volume.pool.clone()).or_default() += volume.size_bytes;
        }
        sum
    }

    /// The picture that the scheduler decides from.
    #[must_use]
    pub fn cluster_view(&self, observed: &Observed) -> ClusterView {
        let shared = self.promised_shared();
        let nodes = self.nodes.iter().map(|(id, row)| {
            let seen = observed.nodes.get(id);
            (id.clone(), self.node_view(id, &row.value, seen.map(AsRef::as_ref), &shared))
        });
        let mut snapshots: BTreeMap<(&str, &str), (usize, usize)> = BTreeMap::new();
        for row in self.snapshots.values() {
            let snapshot = &row.value;
            let (all, shared) =
                snapshots.entry((&snapshot.domain_uid, &snapshot.node)).or_default();
            *all += 1;
            *shared +=
                usize::from(self.snapshot_is_shared(snapshot, &snapshot.node, &snapshot.node));
        }
        let domains = self.domains.iter().map(|(id, row)| {
            let (all, shared) = snapshots
                .get(&(row.value.uid.as_str(), row.value.node.as_str()))
                .copied()
                .unwrap_or_default();
            let usage = observed.domain(&row.value.node, &row.value.uid).and_then(|d| d.usage);
            let view = DomainView {
                node: NodeId::parse(&row.value.node).ok(),
                needs: needs(&row.value),
                disks: self.pool_needs(&row.value),
                disk_bytes: self.disk_bytes(&row.value, observed),
                mobility: self.mobility(&row.value),
                origin: self.origin(&row.value),
                snapshots: all,
                snapshots_shared: shared,
                cpu_millicores: usage.map_or(0, |usage| usage.cpu_millicores),
            };
            (id.clone(), view)
        });
        ClusterView { nodes: nodes.collect(), domains: domains.collect() }
    }

    fn node_view(
        &self,
        id: &NodeId,
        node: &NodeRecord,
        seen: Option<&NodeObservation>,
        shared: &BTreeMap<String, Promised>,
    ) -> NodeView {
        let capacity = node.capacity.unwrap_or_default();
        let migrating = self.concerning(id).filter(|row| row.value.migration.is_some());
        NodeView {
            ready: node.state() == NodeState::Ready,
            cordoned: node.cordoned,
            draining: node.drain_state() != DrainState::Unspecified,
            capacity: Resources { vcpus: capacity.vcpus, memory_bytes: capacity.memory_bytes },
            reserved: self.reserved(id),
            pools: self.pools(id, seen, shared),
            link_bytes_per_second: LINK_BYTES_PER_SECOND,
            migrations: u32::try_from(migrating.count()).unwrap_or(u32::MAX),
        }
    }

    fn pools(
        &self,
        node: &NodeId,
        seen: Option<&NodeObservation>,
        shared: &BTreeMap<String, Promised>,
    ) -> BTreeMap<String, PoolView> {
        let Some(seen) = seen.filter(|seen| !seen.pools.is_empty()) else {
            return BTreeMap::new();
        };
        let mut promised = self.promised(node);
        let view = |(id, pool): (&String, &ObservedPool)| {
            let closed = match pool.state() {
                // What is decided rests on the row.
                _ if pool.shared_uid != self.shared_uid(node.as_str(), id) => {
                    Some("is not known well enough yet".to_owned())
                }
                PoolState::Ready => None,
                PoolState::Filling => Some("is past its threshold".to_owned()),
                _ => Some(format!("cannot be used: {}", pool.state_reason)),
            };
            let view = PoolView {
                capacity_bytes: (pool.size_bytes as f64 * pool.overcommit.max(0.0)) as u64,
                promised_bytes: match pool.shared_uid.as_str() {
                    "" => promised.remove(id).unwrap_or_default(),
                    uid => shared.get(uid).map_or(0, |shared| shared.bytes),
                },
                broken: !matches!(pool.state(), PoolState::Ready | PoolState::Filling)
                    || pool.shared_uid != self.shared_uid(node.as_str(), id),
                shared_uid: pool.shared_uid.clone(),
                closed,
            };
            (id.clone(), view)
        };
        seen.pools.iter().map(view).collect()
    }

    fn put_operation(&mut self, row: Versioned<OperationRecord>) {
        let id = records::operation_id(&row.value);
        if records::is_active(&row.value) {
            self.operations.insert(id, row);
        } else if !row.value.parent.is_empty() {
            self.ended_moves.insert(id, row);
        }
    }

    fn forget_ended_moves(&mut self) {
        let operations = &self.operations;
        self.ended_moves
            .retain(|_, row| operations.contains_key(&OperationId::trusted(&row.value.parent)));
    }

    fn put_domain(&mut self, row: Versioned<DomainRecord>) {
        let id = records::domain_id(&row.value);
        for node in nodes_of(&row.value) {
            self.by_node.entry(node).or_default().insert(id.clone());
        }
        self.domains.insert(id, row);
    }

    fn remove_domain(&mut self, id: &DomainId) -> Option<Versioned<DomainRecord>> {
        let row = self.domains.remove(id)?;
        for node in nodes_of(&row.value) {
            if let Some(ids) = self.by_node.get_mut(&node) {
                ids.remove(id);
                if ids.is_empty() {
                    self.by_node.remove(&node);
                }
            }
        }
        Some(row)
    }
}

/// The nodes that a domain concerns.
fn nodes_of(domain: &DomainRecord) -> BTreeSet<NodeId> {
    let migration = domain.migration.iter().flat_map(|m| [m.from.as_str(), m.to.as_str()]);
    let all = migration.chain([domain.node.as_str()]);
    all.filter(|id| !id.is_empty()).map(NodeId::trusted).collect()
}

fn mobility(domain: &DomainRecord, unready: Option<&VolumeRecord>) -> Mobility {
    let policy = domain.spec.as_ref().map(|spec| spec.drain_policy());
    if policy == Some(DrainPolicy::Stay) {
        return Mobility::Fixed(
            "its drain policy is STAY: stop and delete it, or wait for its owner".into(),
        );
    }
    if domain.state() == DomainState::Lost {
        return Mobility::Busy(format!(
            "it is lost ({}): it waits for its node to come back",
            domain.state_reason
        ));
    }
    if !domain.operation.is_empty() {
        return Mobility::Busy(format!("operations/{} works on it", domain.operation));
    }
    match domain.state() {
        _ if records::is_at_rest(domain) => match unready {
            Some(volume) if volume.state() == VolumeState::Failed => {
                Mobility::Fixed(records::unready(volume))
            }
            Some(volume) => Mobility::Busy(records::unready(volume)),
            None => Mobility::Cold,
        },
        DomainState::Running if records::has_memory(domain) => {
            Mobility::Busy("what it was saved to is about to be removed".into())
        }
        DomainState::Running => Mobility::Live,
        DomainState::Deleting => Mobility::Busy("it is being deleted".into()),
        state => Mobility::Busy(format!("it is {}", words(state))),
    }
}

fn words(state: DomainState) -> String {
    let name = state.as_str_name().trim_start_matches("DOMAIN_STATE_");
    name.to_ascii_lowercase()
}

fn by_key<T: Record>(rows: impl Iterator<Item = Versioned<T>>) -> BTreeMap<String, Versioned<T>> {
    rows.map(|row| (row.value.key(), row)).collect()
}

fn replace<T: Record>(
    rows: &mut BTreeMap<String, Versioned<T>>,
    key: &str,
    value: Option<T>,
    revision: u64,
) {
    let held = rows.remove(key);
    if let Some(row) = versioned(value, held, revision) {
        rows.insert(key.to_owned(), row);
    }
}

fn replace_on<T: Record>(
    rows: &mut BTreeMap<String, Versioned<T>>,
    index: &mut ByNode,
    node: impl Fn(&T) -> String,
    key: &str,
    value: Option<T>,
    revision: u64,
) {
    if let Some(held) = rows.get(key) {
        index.remove(&node(&held.value), key);
    }
    if let Some(value) = &value {
        index.put(&node(value), key);
    }
    replace(rows, key, value, revision);
}

fn versioned<T: Record>(
    value: Option<T>,
    held: Option<Versioned<T>>,
    revision: u64,
) -> Option<Versioned<T>> {
    let create_revision = held.map_or(revision, |row| row.create_revision);
    value.map(|value| Versioned { value, create_revision, mod_revision: revision })
}
