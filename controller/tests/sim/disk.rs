//! A disk in memory that forgets what was not synced.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard};

use drover_controller::store::{Batch, Engine, EngineError, Family, KeyValue, Op};

type Content = BTreeMap<(Family, Vec<u8>), Vec<u8>>;

/// The disk of one member; it outlives the member's processes.
#[derive(Default)]
pub(crate) struct SimDisk {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    synced: Content,
    /// As the process sees it.
    current: Content,
    unsynced: Vec<Batch>,
    /// Writes until one fails.
    fails_in: Option<u32>,
    lies: bool,
}

impl SimDisk {
    pub(crate) fn lying(lies: bool) -> Self {
        Self { inner: Mutex::new(Inner { lies, ..Inner::default() }) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// The process will find a write fail, `writes` from now: it may be on disk or not.
    pub(crate) fn fail_in(&self, writes: u32) {
        self.inner().fails_in = Some(writes);
    }

    /// Batches that a crash may lose.
    pub(crate) fn unsynced(&self) -> usize {
        self.inner().unsynced.len()
    }

    /// The process is dead: of what was not synced, a prefix of `keep` batches stays.
    pub(crate) fn crash(&self, keep: usize) {
        let mut inner = self.inner();
        let unsynced = std::mem::take(&mut inner.unsynced);
        for batch in unsynced.into_iter().take(keep) {
            apply(&mut inner.synced, &batch);
        }
        inner.current = inner.synced.clone();
        inner.fails_in = None;
    }
}

fn apply(content: &mut Content, batch: &Batch) {
    for op in &batch.ops {
        match op {
            Op::Put { family, key, value } => {
                content.insert((*family, key.clone()), value.clone());
            }
            Op::Delete { family, key } => {
                content.remove(&(*family, key.clone()));
            }
            Op::DeleteRange { family, from, to } => {
                let gone: Vec<_> = content
                    .range((*family, from.clone())..(*family, to.clone()))
                    .map(|(key, _)| key.clone())
                    .collect();
                for key in gone {
                    content.remove(&key);
                }
            }
        }
    }
}

impl Engine for SimDisk {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.inner().current.get(&(family, key.to_vec())).cloned())
    }

    fn scan(
        &self,
        family: Family,
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<KeyValue>, EngineError> {
        let inner = self.inner();
        let rows = inner
            .current
            .range((Bound::Included((family, from.to_vec())), Bound::Unbounded))
            .take_while(|((f, _), _)| *f == family)
            .take(limit)
            .map(|((_, key), value)| (key.clone(), value.clone()));
        Ok(rows.collect())
    }

    fn write(&self, batch: Batch, sync: bool) -> Result<(), EngineError> {
        let mut inner = self.inner();
        if let Some(left) = &mut inner.fails_in {
            if *left == 0 {
                // Whether it is there, the crash decides.
                inner.unsynced.push(batch);
                return Err(EngineError("simulated: the process dies in a write".into()));
            }
            *left -= 1;
        }
        apply(&mut inner.current, &batch);
        inner.unsynced.push(batch);
        if sync && !inner.lies {
            inner.synced = inner.current.clone();
            inner.unsynced.clear();
        }
        Ok(())
    }
}
