//! Rows by the node that they lie on, for what lies there without a domain.

use std::collections::{BTreeMap, BTreeSet};

use super::NodeId;

/// Keys of one table's rows.
#[derive(Clone, Debug, Default)]
pub(super) struct ByNode(BTreeMap<NodeId, BTreeSet<String>>);

impl ByNode {
    /// Of these rows: node and key.
    pub(super) fn of<'a>(rows: impl Iterator<Item = (&'a str, &'a String)>) -> Self {
        let mut index = Self::default();
        for (node, key) in rows {
            index.put(node, key);
        }
        index
    }

    /// The row lies on `node`; nowhere when that is empty.
    pub(super) fn put(&mut self, node: &str, key: &str) {
        if !node.is_empty() {
            self.0.entry(NodeId::trusted(node)).or_default().insert(key.to_owned());
        }
    }

    /// It does not, any more.
    pub(super) fn remove(&mut self, node: &str, key: &str) {
        let id = NodeId::trusted(node);
        let Some(keys) = self.0.get_mut(&id) else { return };
        keys.remove(key);
        if keys.is_empty() {
            self.0.remove(&id);
        }
    }

    /// All on `node`.
    pub(super) fn on(&self, node: &NodeId) -> impl Iterator<Item = &String> {
        self.0.get(node).into_iter().flatten()
    }
}
