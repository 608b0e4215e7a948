//! Members on real disks and real sockets, on loopback.

#![allow(clippy::unwrap_used)]

mod group;

use std::time::Duration;

use drover_controller::raft::{Claim, Failure, IdentityError, StartError};
use drover_controller::store::{CommitError, Leadership, Txn};
use group::process::Processes;
use group::{Group, Row, deadline, put, within};

/// What is committed on the leader is read on every member, and its changes are told.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_seen_everywhere() {
    let mut group = Group::new(3);
    group.start_all().await;
    let leader = group.leader().await;
    let follower = leader % 3 + 1;

    let refused = group.store(follower).commit(put("a", 1), deadline()).await;
    let address = Some(group.address(leader).to_owned());
    assert_eq!(refused, Err(CommitError::NotLeader { leader_address: address }));

    let before = group.store(follower).view().revision();
    let revision = group.store(leader).commit(put("a", 2), deadline()).await.unwrap();
    for id in 1..=3 {
        let store = group.store(id);
        store.barrier(deadline()).await.unwrap();
        let row = store.view().get::<Row>("a").unwrap();
        assert_eq!((row.value.value, row.mod_revision), (2, revision), "member {id}");
    }
    let mut changes = group.store(follower).watch(before).unwrap();
    let set = within(async {
        loop {
            let set = changes.next().await.unwrap();
            if set.changes.iter().any(|change| change.is::<Row>()) {
                return set;
            }
        }
    })
    .await;
    assert_eq!(set.revision, revision);
    assert_eq!(set.changes[0].record::<Row>().unwrap().value, 2);

    // A row that was read, and has changed since, is not overwritten.
    let store = group.store(leader);
    let read = store.view().get::<Row>("a").unwrap();
    store.commit(put("a", 3), deadline()).await.unwrap();
    let stale = Txn::new().unchanged(&read).put(&Row { key: "a".into(), ..Row::default() });
    let refused = store.commit(stale, deadline()).await;
    let now = store.view().get::<Row>("a").unwrap();
    assert_eq!(refused, Err(CommitError::Guard { index: 0, mod_revision: now.mod_revision }));
    assert_eq!(now.value.value, 3);

    let term = store.leadership().borrow().term;
    store.commit(put("a", 4).term_is(term), deadline()).await.unwrap();
    let refused = store.commit(put("a", 5).term_is(term + 1), deadline()).await;
    assert_eq!(refused, Err(CommitError::Guard { index: 0, mod_revision: 0 }));

    let large = Row { key: "large".into(), filler: vec![0; 2 << 20], ..Row::default() };
    let refused = store.commit(Txn::new().put(&large), deadline()).await;
    assert!(matches!(refused, Err(CommitError::TooLarge { .. })), "{refused:?}");
    group.stop_all().await;
}

/// A member that was away for longer than the log reaches back gets a snapshot, over the
/// wire, and is equal to the others then.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_away_catches_up() {
    let mut group = Group::new(3);
    group.start_all().await;
    let leader = group.leader().await;
    let away = leader % 3 + 1;
    group.kill(away).await;
    for i in 0..60 {
        let filler = vec![i; 50_000];
        let row = Row { key: format!("row-{i}"), value: i.into(), filler };
        group.store(leader).commit(Txn::new().put(&row), deadline()).await.unwrap();
    }
    group.start(away).await;
    let expected = group.store(leader).view();
    let store = group.store(away).clone();
    within(group::reaches(&store, expected.revision())).await;
    assert_eq!(store.view().content_hash(), expected.content_hash());
    assert_eq!(store.view().all::<Row>().count(), 60);
    // It has the rows but not how they came: so it was a snapshot.
    assert!(store.watch(1).is_err());
    // And it is a member like any other.
    store.barrier(deadline()).await.unwrap();
    group.stop_all().await;
}

/// The leader goes, in an orderly way: another one leads before it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stops_hands_over() {
    let mut group = Group::new(3);
    group.start_all().await;
    let leader = group.leader().await;
    let other = leader % 3 + 1;
    let mut seen = group.store(other).leadership();
    let term = seen.borrow().term;
    group.stop(leader).await;
    let gone = |now: &Leadership| now.leader.is_some_and(|id| id != leader);
    let now = within(seen.wait_for(gone)).await.unwrap().clone();
    assert_eq!(now.term, term + 1, "it took one election");
    let leader = group.leader().await;
    group.store(leader).commit(put("a", 1), deadline()).await.unwrap();
    group.stop_all().await;
}

/// Without a majority nothing is acknowledged, and nobody waits for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_minority_says_so() {
    let mut group = Group::new(3);
    group.start_all().await;
    let leader = group.leader().await;
    for id in (1..=3).filter(|id| *id != leader) {
        group.kill(id).await;
    }
    let store = group.store(leader).clone();
    let soon = || std::time::Instant::now() + Duration::from_millis(300);
    let result = store.commit(put("a", 1), soon()).await;
    assert_eq!(result, Err(CommitError::Unknown));
    assert!(store.barrier(soon()).await.is_err());
    // It notices that it leads nobody.
    let mut leadership = store.leadership();
    within(leadership.wait_for(|now| now.leader.is_none())).await.unwrap();
    let refused = store.commit(put("a", 1), soon()).await;
    assert_eq!(refused, Err(CommitError::NotLeader { leader_address: None }));
    group.stop_all().await;
}

/// A second controller with a member's id, and one of another cluster, end with one clear
/// error; the cluster does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused() {
    let mut group = Group::new(3);
    group.start_all().await;
    let leader = group.leader().await;
    within(group::all_recorded(group.store(leader), 3)).await;
    let term = group.store(leader).leadership().borrow().term;

    let claim = group.claim(3);
    let other = Claim { cluster_id: "other".into(), ..claim.clone() };
    for (claim, expected) in [
        (claim, "--id 3: member 3 of cluster \"group\" has another data directory"),
        (other, "--cluster-id \"other\": this is cluster \"group\""),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut stranger = group::start_member(claim, dir.path()).unwrap();
        let failure = within(stranger.failed()).await;
        assert!(matches!(failure, Failure::Refused(_)), "{failure}");
        assert!(failure.to_string().contains(expected), "{failure}");
        stranger.abandon().await;
    }
    assert_eq!(group.store(leader).leadership().borrow().term, term);
    group.store(leader).commit(put("a", 1), deadline()).await.unwrap();
    group.stop_all().await;
}

/// One member with a wrong cluster id does not end those that are right.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_in_error_is_alone_in_it() {
    let mut group = Group::new(3);
    group.start(1).await;
    group.start(2).await;
    let wrong = Claim { cluster_id: "wrong".into(), ..group.claim(3) };
    group.start_as(3, wrong);
    let failure = within(group.running(3).failed()).await;
    assert!(failure.to_string().contains("--cluster-id \"wrong\""), "{failure}");
    let leader = group.leader().await;
    assert_ne!(leader, 3);
    group.store(leader).commit(put("a", 1), deadline()).await.unwrap();
    group.kill(3).await;
    group.stop_all().await;
}

/// A data directory is one member's of one cluster.
#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_belongs_to_one() {
    let dir = tempfile::tempdir().unwrap();
    let group = Group::new(3);
    let claim = group.claim(1);
    let running = group::start_member(claim.clone(), dir.path()).unwrap();
    let error = group::start_member(claim.clone(), dir.path()).err().unwrap();
    assert!(matches!(error, StartError::Open(_)), "{error}");
    running.abandon().await;

    let mut fewer = claim.clone();
    fewer.members.remove(&3);
    for (claim, expected) in [
        (Claim { cluster_id: "other".into(), ..claim.clone() }, "--cluster-id \"other\""),
        (Claim { member: 2, ..claim.clone() }, "--id 2"),
        (fewer, "--member"),
    ] {
        let error = group::start_member(claim, dir.path()).err().unwrap();
        assert!(
            matches!(
                error,
                StartError::Identity(
                    IdentityError::Cluster { .. }
                        | IdentityError::Member { .. }
                        | IdentityError::Voters { .. }
                )
            ),
            "{error}"
        );
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    let running = group::start_member(claim, dir.path()).unwrap();
    running.abandon().await;
}

/// The story of an operator's bad night: the leader's machine dies, then all of them at once.
/// Nothing that was acknowledged is gone.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_kill_9() {
    let mut processes = Processes::new(3);
    for id in 1..=3 {
        processes.start(id);
    }
    let mut acknowledged = Vec::new();
    let leader = processes.leader().await;
    for i in 0..20 {
        processes.register(&format!("before-{i}")).await;
        acknowledged.push(format!("nodes/before-{i}"));
    }
    processes.kill(leader);
    let killed = std::time::Instant::now();
    for i in 20..40 {
        processes.register(&format!("after-{i}")).await;
        acknowledged.push(format!("nodes/after-{i}"));
        if i == 20 {
            // 10 to 19 ticks of silence and an election; the rest is for a busy machine.
            let waited = killed.elapsed();
            println!("written again {waited:?} after the leader was killed");
            assert!(waited < Duration::from_secs(20), "{waited:?}");
        }
    }
    let next = processes.leader().await;
    assert_ne!(next, leader);

    // The one that was killed comes back and has all of it.
    processes.start(leader);
    acknowledged.sort();
    assert_eq!(processes.nodes(leader).await, acknowledged);

    // The whole rack loses power.
    for id in 1..=3 {
        processes.kill(id);
    }
    for id in 1..=3 {
        processes.start(id);
    }
    for id in 1..=3 {
        assert_eq!(processes.nodes(id).await, acknowledged, "member {id}");
    }

    // Asked to end, the leader does, well, and another one leads.
    let leader = processes.leader().await;
    let status = processes.terminate(leader).await;
    assert!(status.success(), "{status}");
    assert_ne!(processes.leader().await, leader);
    assert_eq!(processes.nodes(leader % 3 + 1).await, acknowledged);
}

/// What cannot be is said in one line, with the exit code for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_cannot_run_says_why() {
    let mut processes = Processes::new(3);
    let dir = tempfile::tempdir().unwrap();
    let nonsense = processes.command_as(4, dir.path(), "127.0.0.1:0", "c");
    let (code, line) = Processes::ends(nonsense).await;
    assert_eq!(code, Some(2), "{line}");
    assert!(line.contains("--id \"4\": --member names [1, 2, 3]"), "{line}");

    for id in 1..=3 {
        processes.start(id);
    }
    // Every storage is recorded with the first writes of the first leader.
    processes.leader().await;
    processes.register("n-1").await;
    let taken = processes.command_as(3, &dir.path().join("taken"), "127.0.0.1:0", "process-test");
    let (code, line) = Processes::ends(taken).await;
    assert_eq!(code, Some(1), "{line}");
    assert!(line.starts_with("drover-controller: member "), "{line}");
    assert!(line.contains("--id 3: member 3 of cluster"), "{line}");

    let stranger = processes.command_as(3, &dir.path().join("stranger"), "127.0.0.1:0", "else");
    let (code, line) = Processes::ends(stranger).await;
    assert_eq!(code, Some(1), "{line}");
    assert!(line.contains("--cluster-id \"else\": this is cluster \"process-test\""), "{line}");
}
