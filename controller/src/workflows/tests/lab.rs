//! A cluster in memory: the real rows and transactions, made-up reports, a clock that is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use drover_proto::agent::v1::{
    Assignment, Hello, MigrationProgress, MigrationRole, ObservedDomain, ObservedImage,
    ObservedMigration, ObservedPool, ObservedSnapshot, ObservedState, ObservedVolume, Report,
};
use drover_proto::v1::{
    Boot, DomainSpec, DomainState, ExitReason, MigrationLimits, NodeCapacity, OperationState,
    PowerState,
};

use crate::model::{
    DomainId, DomainRecord, EventRecord, NodeId, NodeObservation, NodeRecord, Observed,
    OperationRecord, World,
};
use crate::scheduler::Strategy;
use crate::store::{Outcome, State, TXN_BYTES_MAX, Txn, View};
use crate::workflows::begin::{self, Begun, NewDomain};
use crate::workflows::desired::{Level, desired};
use crate::workflows::{Context, Ids, Now, Refusal, Settings, nodes, plan};

pub(super) const MIB: u64 = 1 << 20;
const LARGE_BYTES: usize = 31 << 10;

/// Names in the order in which they are asked for.
#[derive(Default)]
pub(super) struct CountingIds(AtomicU64);

impl Ids for CountingIds {
    fn uuid(&self) -> String {
        let n = self.0.fetch_add(1, Ordering::Relaxed);
        format!("{n:08x}-0000-4000-8000-{n:012x}")
    }
    fn token(&self) -> String {
        format!("token-{}", self.uuid())
    }
}

pub(super) struct Lab {
    pub(super) state: State,
    pub(super) observed: Observed,
    pub(super) now: Now,
    pub(super) term: u64,
    pub(super) leader_since_ms: u64,
    pub(super) settings: Settings,
    /// What each node's next report says of its pools and what is in them.
    pub(super) pools: BTreeMap<String, Vec<ObservedPool>>,
    pub(super) volumes: BTreeMap<String, Vec<ObservedVolume>>,
    pub(super) images: BTreeMap<String, Vec<ObservedImage>>,
    pub(super) snapshots: BTreeMap<String, Vec<ObservedSnapshot>>,
    ids: CountingIds,
}

impl Lab {
    pub(super) fn new() -> Self {
        Self {
            state: State::default(),
            observed: Observed::default(),
            now: Now { wall_ms: 1_700_000_000_000, mono_ms: 1_000_000 },
            term: 1,
            leader_since_ms: 1_000_000,
            settings: Settings::default(),
            pools: BTreeMap::new(),
            volumes: BTreeMap::new(),
            images: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            ids: CountingIds::default(),
        }
    }

    /// Nodes `a`, `b` … with room for a few domains, all heard.
    pub(super) fn with_nodes(names: &[&str]) -> Self {
        let mut lab = Self::new();
        for name in names {
            lab.hello(name, "boot-1");
        }
        lab
    }

    pub(super) fn view(&self) -> View {
        self.state.clone().into()
    }

    pub(super) fn world(&self) -> World {
        World::load(&self.view())
    }

    /// Asks something that answers with a transaction, and commits it.
    pub(super) fn with<T>(
        &mut self,
        ask: impl FnOnce(&Context<'_>) -> Result<(Txn, T), Refusal>,
    ) -> Result<T, Refusal> {
        let world = self.world();
        let (txn, answer) = ask(&self.context(&world))?;
        assert!(self.commit(&txn), "a fresh decision is not outdated");
        Ok(answer)
    }

    pub(super) fn context<'a>(&'a self, world: &'a World) -> Context<'a> {
        Context {
            world,
            observed: &self.observed,
            now: self.now,
            term: self.term,
            leader_since_ms: self.leader_since_ms,
            settings: &self.settings,
            ids: &self.ids,
        }
    }

    /// True when the guards held.
    pub(super) fn commit(&mut self, txn: &Txn) -> bool {
        let bytes = txn.encode().len();
        assert!(bytes <= TXN_BYTES_MAX, "a transaction of {bytes} bytes is never committed");
        matches!(self.state.apply(self.term, txn, |_, _| {}), Outcome::Committed { .. })
    }

    /// Passes until nothing is left to do; every step of a pass must be committable.
    pub(super) fn settle(&mut self) {
        for _ in 0..50 {
            let world = self.world();
            let steps = plan(&self.context(&world));
            if steps.is_empty() {
                return;
            }
            for step in steps {
                assert!(self.commit(&step.txn), "steps of one pass collide: {}", step.subject);
            }
        }
        panic!("the workflows do not come to rest");
    }

    pub(super) fn pass_time(&mut self, ms: u64) {
        self.now.wall_ms += i64::try_from(ms).unwrap();
        self.now.mono_ms += ms;
    }

    pub(super) fn hello(&mut self, name: &str, boot_id: &str) {
        let hello = hello(name, boot_id);
        let id = NodeId::trusted(name);
        self.with(|cx| Ok((nodes::register(cx, &id, &hello)?.unwrap_or_default(), ()))).unwrap();
        let now_ms = self.now.mono_ms;
        let seen = Arc::make_mut(self.observed.nodes.entry(id).or_default());
        *seen = NodeObservation { connected: true, heard_ms: now_ms, ..Default::default() };
        self.report(name, vec![]);
    }

    /// The agent says that this is all, and that it knows the rows as they are.
    pub(super) fn report(&mut self, node: &str, domains: Vec<ObservedDomain>) {
        let revision = self.state.revision();
        self.report_knowing(node, revision, domains);
    }

    pub(super) fn report_knowing(
        &mut self,
        node: &str,
        revision: u64,
        domains: Vec<ObservedDomain>,
    ) {
        let now_ms = self.now.mono_ms;
        let seen = self.observed.nodes.entry(NodeId::trusted(node)).or_default();
        let report = Report {
            domains,
            pools: self.pools.get(node).cloned().unwrap_or_default(),
            volumes: self.volumes.get(node).cloned().unwrap_or_default(),
            images: self.images.get(node).cloned().unwrap_or_default(),
            snapshots: self.snapshots.get(node).cloned().unwrap_or_default(),
            ..Report::default()
        };
        Arc::make_mut(seen).take(report, revision, now_ms);
    }

    /// A heartbeat without news.
    pub(super) fn beat(&mut self, node: &str) {
        let (now_ms, revision) = (self.now.mono_ms, self.state.revision());
        let seen = Arc::make_mut(self.observed.nodes.get_mut(&NodeId::trusted(node)).unwrap());
        (seen.heard_ms, seen.taken_in) = (now_ms, revision);
    }

    pub(super) fn create(&mut self, id: &str, node: &str) -> Result<OperationRecord, Refusal> {
        let new = new_domain(id, Some(node));
        self.with(|cx| begin::create_domain(cx, &new).map(split))
    }

    /// Created, and running on the node as its agent says.
    pub(super) fn running(&mut self, id: &str, node: &str) {
        self.create(id, node).unwrap();
        let domain = self.observed(id, 1, ObservedState::Running);
        self.report(node, vec![domain]);
        self.settle();
    }

    /// As many domains as a test likes, each with a row nearly as large as the API accepts, in
    /// this state, on `node`. They need next to nothing.
    pub(super) fn large(&mut self, count: usize, node: &str, state: DomainState) -> Vec<String> {
        let mut new = new_domain("any", Some(node)).spec;
        (new.vcpus, new.memory_bytes) = (0, 1);
        let text = "x".repeat(LARGE_BYTES);
        new.labels.insert("text".into(), text);
        let ids: Vec<String> = (0..count).map(|n| format!("{node}-{n:03}")).collect();
        for id in &ids {
            let mut row = DomainRecord {
                id: id.clone(),
                uid: format!("uid-of-{id}"),
                spec: Some(new.clone()),
                node: node.into(),
                epoch: 1,
                epoch_max: 1,
                start_generation: 1,
                ..DomainRecord::default()
            };
            row.set_state(state);
            row.set_desired_power(match state {
                DomainState::Stopped => PowerState::Stopped,
                _ => PowerState::Running,
            });
            assert!(self.commit(&Txn::new().put(&row)));
        }
        ids
    }

    pub(super) fn migrate(&mut self, id: &str, to: &str) -> Result<OperationRecord, Refusal> {
        let (id, to) = (DomainId::trusted(id), NodeId::trusted(to));
        self.with(|cx| begin::migrate_domain(cx, &id, Some(&to), &limits()).map(split))
    }

    pub(super) fn cancel(&mut self, operation: &str) -> Result<(), Refusal> {
        let row = self.view().get::<OperationRecord>(operation).unwrap();
        self.with(|cx| begin::cancel_operation(cx, &row).map(|begun| (begun.txn, ())))
    }

    pub(super) fn domain(&self, id: &str) -> DomainRecord {
        self.view().get::<DomainRecord>(id).unwrap().value
    }

    pub(super) fn operation(&self, id: &str) -> OperationRecord {
        self.view().get::<OperationRecord>(id).unwrap().value
    }

    pub(super) fn node(&self, id: &str) -> NodeRecord {
        self.view().get::<NodeRecord>(id).unwrap().value
    }

    pub(super) fn events(&self) -> Vec<String> {
        let mut rows: Vec<_> = self.view().all::<EventRecord>().collect();
        rows.sort_by_key(|row| row.create_revision);
        rows.into_iter().map(|row| row.value.reason).collect()
    }

    pub(super) fn desired(&self, node: &str) -> Vec<Assignment> {
        self.level(node).domains
    }

    pub(super) fn level(&self, node: &str) -> Level {
        desired(&self.world(), &NodeId::trusted(node))
    }

    pub(super) fn assignment(&self, node: &str, id: &str) -> Option<Assignment> {
        let name = format!("domains/{id}");
        self.desired(node).into_iter().find(|assignment| assignment.name == name)
    }

    pub(super) fn observed(&self, id: &str, epoch: u64, state: ObservedState) -> ObservedDomain {
        ObservedDomain {
            uid: self.domain(id).uid,
            name: format!("domains/{id}"),
            epoch,
            state: state.into(),
            ..ObservedDomain::default()
        }
    }
}

pub(super) fn split(begun: Begun) -> (Txn, OperationRecord) {
    (begun.txn, begun.operation)
}

pub(super) fn hello(name: &str, boot_id: &str) -> Hello {
    Hello {
        cluster_id: "lab".into(),
        node: format!("nodes/{name}"),
        node_uid: format!("uid-of-{name}"),
        boot_id: boot_id.into(),
        address: format!("{name}:7401"),
        capacity: Some(NodeCapacity { vcpus: 16, memory_bytes: 4096 * MIB }),
        ..Hello::default()
    }
}

pub(super) fn new_domain(id: &str, node: Option<&str>) -> NewDomain {
    NewDomain {
        networks: BTreeSet::new(),
        id: DomainId::trusted(id),
        spec: DomainSpec {
            vcpus: 1,
            memory_bytes: 256 * MIB,
            boot: Some(Boot { kernel: "/boot/vmlinuz".into(), ..Boot::default() }),
            ..DomainSpec::default()
        },
        only: node.map(NodeId::trusted),
        leave_stopped: false,
        strategy: Strategy::BestFit,
    }
}

pub(super) fn limits() -> MigrationLimits {
    MigrationLimits {
        downtime: Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }),
        total_time: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        rounds_max: 30,
        ..MigrationLimits::default()
    }
}

pub(super) trait Observe: Sized {
    fn migrating(self, id: &str, role: MigrationRole, progress: MigrationProgress) -> Self;
    fn because(self, exit: ExitReason, reason: &str) -> Self;
}

impl Observe for ObservedDomain {
    fn migrating(mut self, id: &str, role: MigrationRole, progress: MigrationProgress) -> Self {
        let listening =
            matches!(progress, MigrationProgress::Listening | MigrationProgress::Copying)
                && role == MigrationRole::Destination;
        self.migration = Some(ObservedMigration {
            id: id.into(),
            role: role.into(),
            progress: progress.into(),
            listen_address: if listening { "b:4000".into() } else { String::new() },
            error: match progress {
                MigrationProgress::Failed => "the connection broke".into(),
                _ => String::new(),
            },
            ..ObservedMigration::default()
        });
        self
    }

    fn because(mut self, exit: ExitReason, reason: &str) -> Self {
        self.exit_reason = exit.into();
        self.state_reason = reason.into();
        self
    }
}

pub(super) fn ended(operation: &OperationRecord) -> (OperationState, String) {
    let reason = operation.error.as_ref().map(|e| e.reason.clone()).unwrap_or_default();
    (operation.state(), reason)
}
