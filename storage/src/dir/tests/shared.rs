//! Two nodes with one directory: what each sees, and what neither takes from the other.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::*;
use crate::pool::Pool;

const MIB: u64 = 1 << 20;

fn uid() -> String {
    uuid::Uuid::new_v4().to_string()
}

fn identify(root: &Path) -> String {
    let uid = uid();
    fs::write(root.join("drover-pool"), format!("{uid}\n")).unwrap();
    uid
}

fn open(root: &Path, node: &str) -> crate::Result<Arc<dyn Pool>> {
    pool::open(&PoolSpec::Shared { path: root.to_owned() }, node)
}

/// A mount point where nothing is mounted is not taken for a new pool, whatever it was before.
#[test]
fn a_pool_without_its_identity_is_no_pool() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path(), "a").unwrap_err().to_string();
    assert!(error.contains("drover-pool: is not there: mount"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is made");
    fs::write(dir.path().join("drover-pool"), "pool one").unwrap();
    let error = open(dir.path(), "a").unwrap_err().to_string();
    assert!(error.contains("is no UUID"), "{error}");
    let uid = identify(dir.path());
    assert_eq!(open(dir.path(), "a").unwrap().shared_uid(), Some(uid.as_str()));
}

/// When the filesystem goes away under an agent, or another one comes, nothing is missing: the
/// pool is.
#[test]
fn nothing_is_missing_while_the_pool_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    identify(dir.path());
    let pool = open(dir.path(), "a").unwrap();
    let (id, image) = (uid().parse().unwrap(), ImageId([1; 32]));
    pool.create_volume(id, 4 * MIB).unwrap();
    assert!(pool.image(image).unwrap().is_none());

    for other in [false, true] {
        for entry in fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
        if other {
            identify(dir.path());
            open(dir.path(), "b").unwrap();
        }
        let unfit = |result: Option<PoolError>| {
            assert!(matches!(result, Some(PoolError::Unfit { .. })), "{result:?}");
        };
        unfit(pool.volume(id).err());
        unfit(pool.image(image).err());
        unfit(pool.delete_volume(id).err());
        unfit(pool.delete_image(image).err());
        unfit(pool.activate(id).err());
        assert!(pool.list().is_err());
        assert!(pool.create_volume(id, 4 * MIB).is_err());
    }
}

/// Each node sees what the other has made; what one works on, or has left unfinished, is its own.
#[test]
fn a_draft_is_its_makers() {
    let dir = tempfile::tempdir().unwrap();
    identify(dir.path());
    let (a, b) = (open(dir.path(), "a").unwrap(), open(dir.path(), "b").unwrap());
    let id = uid().parse().unwrap();
    a.create_volume(id, 4 * MIB).unwrap();
    assert_eq!(b.volume(id).unwrap().unwrap().bytes, 4 * MIB);
    assert_eq!(b.create_volume(id, 4 * MIB).unwrap().bytes, 4 * MIB, "it is there");

    // A crash has left them: nobody holds their locks.
    let left = dir.path().join("new/a").join(uid());
    let removed = dir.path().join("new/a/.nfs0001");
    for path in [&left, &removed] {
        fs::write(path, "half").unwrap();
    }
    assert_eq!(b.clean_up().unwrap(), [""; 0]);
    assert!(left.exists() && removed.exists());
    assert_eq!(a.clean_up().unwrap().len(), 2);
    assert!(!left.exists() && !removed.exists());
    assert_eq!(b.list().unwrap().strangers, [""; 0]);

    b.delete_volume(id).unwrap();
    a.delete_volume(id).unwrap();
    assert!(a.volume(id).unwrap().is_none());
}

/// What a VMM of one node has open is deleted by no other.
#[test]
fn what_one_node_has_open_no_other_deletes() {
    let dir = tempfile::tempdir().unwrap();
    identify(dir.path());
    let (a, b) = (open(dir.path(), "a").unwrap(), open(dir.path(), "b").unwrap());
    let id = uid().parse().unwrap();
    let vmm = fs::File::open(a.create_volume(id, 4 * MIB).unwrap().path).unwrap();
    rustix::fs::flock(&vmm, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(matches!(b.delete_volume(id), Err(PoolError::Busy { .. })));
    drop(vmm);
    b.delete_volume(id).unwrap();
}

/// An image is brought by one node at a time; of two that are made at once one is kept.
#[test]
fn an_image_is_brought_once() {
    let dir = tempfile::tempdir().unwrap();
    identify(dir.path());
    let (a, b) = (open(dir.path(), "a").unwrap(), open(dir.path(), "b").unwrap());
    let image = ImageId([7; 32]);
    let claim = a.claim_image(image).unwrap();
    let error = b.claim_image(image).unwrap_err();
    assert!(matches!(error, PoolError::Busy { .. }), "{error}");
    drop(claim);
    drop(b.claim_image(image).unwrap());
    assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), 2, "but for the nodes'");

    let (one, two) = (a.draft_image(MIB).unwrap(), b.draft_image(MIB).unwrap());
    let made = one.publish(image).unwrap();
    assert_eq!(two.publish(image).unwrap(), made);
    assert_eq!(a.list().unwrap().images, [made]);
    assert_eq!(b.list().unwrap().leftovers, [""; 0]);
}
