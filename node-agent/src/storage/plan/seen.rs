//! What a plan knows of one pool.

use super::Inventory;

/// A pool, as it was seen last.
#[derive(Debug, Clone, Default)]
pub(in crate::storage) struct PoolSeen {
    /// `None` until it could be read.
    pub(in crate::storage) inventory: Option<Inventory>,
    /// Why it cannot be used.
    pub(in crate::storage) fault: Option<String>,
    /// Which pool it is, where several nodes share it; empty for the node's own, and until it was
    /// seen.
    pub(in crate::storage) shared_uid: String,
    /// Others may have made or removed what is spoken of since it was looked at.
    pub(in crate::storage) is_stale: bool,
}

impl PoolSeen {
    /// Why what is not in the inventory may be there all the same.
    pub(super) fn unsure(&self) -> Option<&'static str> {
        match &self.inventory {
            None => Some("its pool has not been looked at yet"),
            Some(_) if self.is_stale => Some("its pool, which others share, is being looked at"),
            Some(_) => None,
        }
    }

    /// Why this is not the pool that the controller speaks of.
    pub(super) fn is_another(&self, meant: &str) -> Option<String> {
        let say = |uid: &str| match uid {
            "" => "the node's own".to_owned(),
            uid => format!("the shared pool {uid}"),
        };
        (self.shared_uid != meant)
            .then(|| format!("is {} here, and {} is meant", say(&self.shared_uid), say(meant)))
    }
}
