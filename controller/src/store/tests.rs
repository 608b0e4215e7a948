//! Transactions, views and watches, without Raft.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use proptest::prelude::*;
use prost::Message as _;
use tokio::sync::watch;

use super::*;

#[derive(Clone, PartialEq, prost::Message)]
struct Thing {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(uint64, tag = "2")]
    value: u64,
}

impl Record for Thing {
    const TABLE: Table = Table::Nodes;
    fn key(&self) -> String {
        self.key.clone()
    }
}

/// Another table, so that mixing them up would show.
#[derive(Clone, PartialEq, prost::Message)]
struct Other {
    #[prost(string, tag = "1")]
    key: String,
}

impl Record for Other {
    const TABLE: Table = Table::Domains;
    fn key(&self) -> String {
        self.key.clone()
    }
}

fn thing(key: &str, value: u64) -> Thing {
    Thing { key: key.into(), value }
}

fn apply(state: &mut State, txn: Txn) -> Outcome {
    // As it comes out of the log.
    let txn = Txn::decode(txn.encode().into()).unwrap();
    state.apply(7, &txn, |_, _| {})
}

fn committed(revision: u64) -> Outcome {
    Outcome::Committed { revision }
}

fn rejected(guard: usize, mod_revision: u64) -> Outcome {
    Outcome::Rejected { guard, mod_revision }
}

fn get(state: &State, key: &str) -> Option<Versioned<Thing>> {
    View::from(state.clone()).get(key)
}

#[test]
fn rows_and_their_revisions() {
    let mut state = State::default();
    assert_eq!(apply(&mut state, Txn::new().put(&thing("a", 1)).put(&thing("b", 2))), committed(1));
    assert_eq!(apply(&mut state, Txn::new().put(&thing("a", 3))), committed(2));
    let a = get(&state, "a").unwrap();
    assert_eq!((a.value.value, a.create_revision, a.mod_revision), (3, 1, 2));
    // Deleted and made again, it is another row.
    assert_eq!(apply(&mut state, Txn::new().delete::<Thing>("a")), committed(3));
    assert_eq!(get(&state, "a"), None);
    apply(&mut state, Txn::new().put(&thing("a", 4)));
    assert_eq!(get(&state, "a").unwrap().create_revision, 4);
    // Nothing written, no revision.
    assert_eq!(apply(&mut state, Txn::new().present::<Thing>("a")), committed(4));
    // Within one transaction the later write stays.
    apply(&mut state, Txn::new().put(&thing("a", 5)).delete::<Thing>("a"));
    assert_eq!(get(&state, "a"), None);
}

#[test]
fn guards() {
    let mut state = State::default();
    apply(&mut state, Txn::new().put(&thing("a", 1)));
    let read = get(&state, "a").unwrap();
    let before = state.content_hash();
    let write = || Txn::new().put(&thing("a", 9));

    assert_eq!(apply(&mut state, write().absent::<Thing>("a")), rejected(0, 1));
    assert_eq!(apply(&mut state, write().present::<Thing>("b")), rejected(0, 0));
    assert_eq!(apply(&mut state, write().term_is(6)), rejected(0, 0));
    let second = write().present::<Thing>("a").absent::<Thing>("a");
    assert_eq!(apply(&mut state, second), rejected(1, 1));
    // A row of the same key in another table is another row.
    assert_eq!(apply(&mut state, write().present::<Other>("a")), rejected(0, 0));
    assert_eq!((state.revision(), state.content_hash()), (1, before));

    assert_eq!(apply(&mut state, write().unchanged(&read).term_is(7)), committed(2));
    assert_eq!(apply(&mut state, write().unchanged(&read)), rejected(0, 2));
    apply(&mut state, Txn::new().delete::<Thing>("a"));
    assert_eq!(apply(&mut state, write().unchanged(&read)), rejected(0, 0));
    assert_eq!(apply(&mut state, write().absent::<Thing>("a")), committed(4));
}

#[test]
fn a_transaction_is_never_larger_than_it_says() {
    let mut txn = Txn::new().term_is(u64::MAX);
    for n in 0..200 {
        let key = "k".repeat(n);
        let row = Versioned { value: thing(&key, 1), create_revision: 1, mod_revision: u64::MAX };
        txn = txn.unchanged(&row).put(&thing(&key, u64::MAX)).delete::<Thing>(key);
        assert!(txn.bytes() >= txn.encode().len());
    }
    assert!(txn.bytes() < 2 * txn.encode().len());
}

#[test]
fn views_do_not_change() {
    let mut state = State::default();
    for key in ["b/1", "b/2", "b/3", "a", "c"] {
        apply(&mut state, Txn::new().put(&thing(key, 1)));
    }
    apply(&mut state, Txn::new().put(&Other { key: "b/0".into() }));
    let view = View::from(state.clone());
    apply(&mut state, Txn::new().delete::<Thing>("b/2").put(&thing("b/1", 2)));

    let keys = |rows: Vec<Versioned<Thing>>| -> Vec<String> {
        rows.into_iter().map(|row| row.value.key).collect()
    };
    assert_eq!(keys(view.all().collect()), ["a", "b/1", "b/2", "b/3", "c"]);
    assert_eq!(keys(view.list("b/", "", 10)), ["b/1", "b/2", "b/3"]);
    assert_eq!(keys(view.list("b/", "b/1", 1)), ["b/2"]);
    assert_eq!(keys(view.list("", "b/3", 10)), ["c"]);
    assert_eq!(keys(view.list("b/", "a", 10)), ["b/1", "b/2", "b/3"]);
    assert_eq!(keys(view.list("b/", "c", 10)), [""; 0]);
    assert_eq!(view.get::<Thing>("b/1").unwrap().value.value, 1);
    assert_eq!(view.revision(), 6);
    assert_eq!(get(&state, "b/1").unwrap().value.value, 2);
}

#[test]
fn what_is_no_command_is_refused() {
    assert!(Txn::decode(Bytes::from_static(b"\xff\xff")).is_err());
    let newer = pb::Command { guards: vec![pb::Guard::default()], writes: Vec::new() };
    assert!(Txn::decode(newer.encode_to_vec().into()).is_err());
    let newer = pb::Command { guards: Vec::new(), writes: vec![pb::Write::default()] };
    assert!(Txn::decode(newer.encode_to_vec().into()).is_err());
}

proptest! {
    /// Any sequence of transactions gives what a plain map gives, and the digest depends on
    /// the rows alone.
    #[test]
    fn as_a_plain_map(steps in prop::collection::vec((0..6_u8, any::<Option<u16>>()), 0..60)) {
        let mut state = State::default();
        let mut plain = BTreeMap::new();
        for (key, value) in steps {
            let key = key.to_string();
            match value {
                Some(value) => {
                    apply(&mut state, Txn::new().put(&thing(&key, value.into())));
                    plain.insert(key, u64::from(value));
                }
                None => {
                    apply(&mut state, Txn::new().delete::<Thing>(key.as_str()));
                    plain.remove(&key);
                }
            }
        }
        let rows: BTreeMap<_, _> = View::from(state.clone())
            .all::<Thing>()
            .map(|row| (row.value.key, row.value.value))
            .collect();
        prop_assert_eq!(rows, plain);
        let rows: Vec<_> = state.rows().map(|(key, row)| (key.clone(), row.clone())).collect();
        let again = State::restore(state.revision(), rows.into_iter().rev());
        prop_assert_eq!(again.content_hash(), state.content_hash());
    }

    /// What is encoded is read back the same.
    #[test]
    fn transactions_round_trip(keys in prop::collection::vec(".{0,8}", 0..5), term in any::<u64>()) {
        let mut txn = Txn::new().term_is(term);
        for key in &keys {
            txn = txn.absent::<Thing>(key.as_str()).put(&thing(key, term)).delete::<Other>(key.as_str());
        }
        prop_assert_eq!(Txn::decode(txn.encode().into()).unwrap(), txn);
    }
}

/// A store's history on disk: revisions `from..=to`, each writing one thing.
fn history(engine: &dyn Engine, from: u64, to: u64) {
    for revision in from..=to {
        let action = pb::change::Action::Put(thing("a", revision).encode_to_vec().into());
        let change = pb::Change {
            table: Table::Nodes.number().into(),
            key: "a".into(),
            action: Some(action),
        };
        let set = pb::ChangeSet { changes: vec![change] }.encode_to_vec();
        let mut batch = Batch::default();
        batch.put(Family::Events, revision.to_be_bytes(), set);
        engine.write(batch, false).unwrap();
    }
}

fn at(revision: u64) -> State {
    State::restore(revision, [])
}

#[tokio::test]
async fn a_watch_misses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine: Arc<dyn Engine> = Arc::new(RocksEngine::open(dir.path()).unwrap());
    history(engine.as_ref(), 1, 600);
    let (publish, state) = watch::channel(at(600));
    let open = |from| ChangeStream::open(engine.clone(), state.clone(), from);

    // From the past, over more than one read, into what comes.
    let mut changes = open(10).unwrap();
    for revision in 11..=600 {
        let set = changes.next().await.unwrap();
        assert_eq!(set.revision, revision);
        assert_eq!(set.changes[0].record::<Thing>(), Some(thing("a", revision)));
        assert_eq!(set.changes[0].record::<Other>(), None);
    }
    // Written is not yet published: whoever hears of it must find it in a view.
    history(engine.as_ref(), 601, 602);
    let next = tokio::time::timeout(std::time::Duration::from_millis(20), changes.next()).await;
    assert!(next.is_err(), "told before it was published");
    publish.send_replace(at(602));
    assert_eq!(changes.next().await.unwrap().revision, 601);
    assert_eq!(changes.next().await.unwrap().revision, 602);

    // From a revision that is not there yet.
    let mut future = open(700).unwrap();
    history(engine.as_ref(), 603, 701);
    publish.send_replace(at(701));
    assert_eq!(future.next().await.unwrap().revision, 701);

    drop(publish);
    assert!(matches!(future.next().await, Err(WatchError::Closed)));
}

#[tokio::test]
async fn a_watch_says_what_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let engine: Arc<dyn Engine> = Arc::new(RocksEngine::open(dir.path()).unwrap());
    history(engine.as_ref(), 1, 1000);
    let (publish, state) = watch::channel(at(1000));
    let open = |from| ChangeStream::open(engine.clone(), state.clone(), from);
    let mut slow = open(0).unwrap();

    let mut batch = Batch::default();
    batch.delete_range(Family::Events, 0_u64.to_be_bytes(), 901_u64.to_be_bytes());
    engine.write(batch, true).unwrap();
    assert_eq!(open(899).err(), Some(Compacted { oldest: 901 }));
    assert_eq!(open(900).unwrap().next().await.unwrap().revision, 901);

    // A reader whose next revision went away is told, and no gap is hidden.
    let mut last = 0;
    let error = loop {
        match slow.next().await {
            Ok(set) => {
                assert_eq!(set.revision, last + 1);
                last = set.revision;
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(error, WatchError::Compacted(Compacted { oldest: 901 })), "{error}");

    // A snapshot takes the whole history.
    let mut batch = Batch::default();
    batch.clear(Family::Events);
    engine.write(batch, true).unwrap();
    publish.send_replace(at(2000));
    assert_eq!(open(1500).err(), Some(Compacted { oldest: 2001 }));
    assert!(open(2000).is_ok());
}
