//! What the simulator does not reach: configuration changes.

use std::sync::Arc;

use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};

use super::*;
use crate::raft::{Claim, Identity};
use crate::store::RocksEngine;

struct Nobody;

impl Waiter for Nobody {
    fn is_abandoned(&self) -> bool {
        false
    }
}

fn open(dir: &std::path::Path) -> Core<Nobody, Nobody> {
    let engine: Arc<dyn Engine> = Arc::new(RocksEngine::open(dir).unwrap());
    let members = BTreeMap::from([(1, "one:1".to_owned())]);
    let claim = Claim { cluster_id: "test".into(), member: 1, members: members.clone() };
    let identity = Identity::establish(engine.as_ref(), &claim, "disk").unwrap();
    let options = Options { identity, members, nonce: 1, seed: 1, limits: Limits::default() };
    Core::open(engine, options).unwrap()
}

fn lead(core: &mut Core<Nobody, Nobody>) {
    for _ in 0..100 {
        core.step(Input::Tick, &mut |_| {}).unwrap();
        core.turn(&mut |_| {}).unwrap();
    }
    assert!(core.leadership().is_leader);
}

/// The entry that ends a joint configuration has no data. Skipped as "empty", as raft-rs's
/// own example does, the group would stay joint for ever.
#[test]
fn a_joint_change_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut core = open(dir.path());
    lead(&mut core);
    let add = ConfChangeSingle { change_type: ConfChangeType::AddLearnerNode.into(), node_id: 2 };
    let change = ConfChangeV2 {
        transition: ConfChangeTransition::Implicit.into(),
        changes: vec![add],
        ..ConfChangeV2::default()
    };
    core.raw.propose_conf_change(Vec::new(), change).unwrap();
    core.turn(&mut |_| {}).unwrap();
    let expected = ConfState { voters: vec![1], learners: vec![2], ..ConfState::default() };
    assert_eq!(core.conf_state, expected);

    // It is on disk as of what is applied: a new process begins with it.
    drop(core);
    let mut core = open(dir.path());
    assert_eq!(core.conf_state, expected);
    lead(&mut core);
}
