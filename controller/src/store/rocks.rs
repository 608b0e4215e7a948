//! The engine on disk: one RocksDB, a column family each.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use rocksdb::{
    ColumnFamily, ColumnFamilyDescriptor, DB, DBRecoveryMode, Direction, IteratorMode, Options,
    WriteBatch, WriteOptions,
};

use super::engine::{Batch, Engine, EngineError, Family, KeyValue, Op};

/// Write buffers of a family. Ours are small records; RocksDB's own default is 64 MiB.
const WRITE_BUFFER_BYTES: usize = 16 << 20;
/// A family that is seldom written would keep old write-ahead logs alive without this.
const WAL_BYTES_MAX: u64 = 128 << 20;
/// RocksDB's text log.
const INFO_LOG_BYTES_MAX: usize = 8 << 20;
const INFO_LOG_FILES_MAX: usize = 4;

/// RocksDB below a data directory, locked for this process.
pub struct RocksEngine {
    db: DB,
    synced: WriteOptions,
    unsynced: WriteOptions,
    /// Held for as long as the database is open.
    _lock: File,
}

/// Why a data directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error(
        "--data-dir {}: in use by another process; stop that one, or give this controller a \
         directory of its own", .0.display()
    )]
    Locked(PathBuf),
    /// It cannot be made, read or written.
    #[error("--data-dir {}: {source}", path.display())]
    Io {
        /// The path that failed.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// RocksDB refuses it.
    #[error(
        "--data-dir {}: the database does not open: {source}; it is damaged or was written by \
         something else. Keep a copy, and do not delete it while other members are down",
        path.display()
    )]
    Database {
        /// The database's directory.
        path: PathBuf,
        /// Why.
        source: rocksdb::Error,
    },
}

impl RocksEngine {
    /// Opens the database in `data_dir`, making both where they are missing.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(data_dir: &Path) -> Result<Self, OpenError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        std::fs::create_dir_all(data_dir).map_err(io(data_dir))?;
        let lock_path = data_dir.join("lock");
        let lock = File::create(&lock_path).map_err(io(&lock_path))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => OpenError::Locked(data_dir.to_owned()),
            TryLockError::Error(source) => OpenError::Io { path: lock_path, source },
        })?;
        let path = data_dir.join("db");
        let families = Family::ALL
            .map(|family| ColumnFamilyDescriptor::new(family.name(), family_options(family)));
        let db = DB::open_cf_descriptors(&database_options(), &path, families)
            .map_err(|source| OpenError::Database { path, source })?;
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        let mut unsynced = WriteOptions::default();
        unsynced.set_sync(false);
        Ok(Self { db, synced, unsynced, _lock: lock })
    }

    fn family(&self, family: Family) -> Result<&ColumnFamily, EngineError> {
        self.db
            .cf_handle(family.name())
            .ok_or_else(|| EngineError(format!("no column family {}", family.name())))
    }
}

fn database_options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // The default mode stops replay silently at the first damage, wherever it is: for a Raft
    // log that means forgetting entries that were acknowledged. This one forgives only the
    // torn end that a crash leaves, and refuses to open otherwise.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    // A batch spans families: what is flushed must be one moment of all of them.
    options.set_atomic_flush(true);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_max_log_file_size(INFO_LOG_BYTES_MAX);
    options.set_keep_log_file_num(INFO_LOG_FILES_MAX);
    options
}

fn family_options(_family: Family) -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options
}

impl Engine for RocksEngine {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.db.get_cf(self.family(family)?, key).map_err(failed)
    }

    fn scan(
        &self,
        family: Family,
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<KeyValue>, EngineError> {
        let mode = IteratorMode::From(from, Direction::Forward);
        self.db
            .iterator_cf(self.family(family)?, mode)
            .take(limit)
            .map(|item| item.map(|(key, value)| (key.into_vec(), value.into_vec())).map_err(failed))
            .collect()
    }

    fn write(&self, batch: Batch, sync: bool) -> Result<(), EngineError> {
        let mut out = WriteBatch::default();
        for op in batch.ops {
            match op {
                Op::Put { family, key, value } => out.put_cf(self.family(family)?, key, value),
                Op::Delete { family, key } => out.delete_cf(self.family(family)?, key),
                Op::DeleteRange { family, from, to } => {
                    out.delete_range_cf(self.family(family)?, from, to);
                }
            }
        }
        let options = if sync { &self.synced } else { &self.unsynced };
        self.db.write_opt(out, options).map_err(failed)
    }
}

fn failed(error: rocksdb::Error) -> EngineError {
    EngineError(error.to_string())
}
