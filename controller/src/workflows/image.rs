//! Images: their rows, and what becomes of the copies.
//!
//! Which nodes hold a copy is what they reported last. When an image goes, each of them is told to
//! remove its copy, one that is away when it is back.

use std::collections::BTreeSet;

use drover_proto::v1::Image;

use super::begin::check_etag;
use super::refusal::Refusal;
use super::step::{Context, timestamp};
use crate::model::{GarbageRecord, ImageId, ImageRecord, NodeId, garbage};
use crate::store::{Txn, Versioned};

/// Fine when the name is free.
///
/// # Errors
/// It is taken.
pub fn absent(cx: &Context<'_>, id: &ImageId) -> Result<(), Refusal> {
    match cx.world.images.contains_key(id.as_str()) {
        true => Err(Refusal::AlreadyExists { name: id.name() }),
        false => Ok(()),
    }
}

/// Makes the row of an image that `node` has.
///
/// # Errors
/// The name is taken, or the node was told to remove this very content and has not said that it
/// has: that would be the image.
pub fn register(
    cx: &Context<'_>,
    id: &ImageId,
    node: &NodeId,
    said: &Image,
) -> Result<Txn, Refusal> {
    absent(cx, id)?;
    let listed = garbage(node.as_str(), ("", ""), "", &said.digest).id;
    if cx.world.garbage.contains_key(&listed) {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "IMAGE_BEING_REMOVED",
            message: format!(
                "{} is still removing a deleted image of the same content: import it again",
                node.name()
            ),
        });
    }
    let record = ImageRecord {
        id: id.as_str().to_owned(),
        digest: said.digest.clone(),
        size_bytes: said.size_bytes,
        create_time: Some(timestamp(cx.now.wall_ms)),
        nodes: vec![node.as_str().to_owned()],
    };
    let txn = Txn::new().term_is(cx.term).absent::<ImageRecord>(id.as_str());
    Ok(txn.absent::<GarbageRecord>(listed).put(&record))
}

/// Forgets an image. Its copies are garbage, in whichever pool they lie, unless another image is
/// the same.
///
/// # Errors
/// There is none, or it has changed.
pub fn delete(cx: &Context<'_>, id: &ImageId, given: &str) -> Result<Txn, Refusal> {
    let row = cx.world.images.get(id.as_str());
    let row = row.ok_or_else(|| Refusal::NotFound { name: id.name() })?;
    check_etag(&id.name(), given, row.mod_revision)?;
    let txn = Txn::new().term_is(cx.term).unchanged(row).delete::<ImageRecord>(id.as_str());
    let digest = &row.value.digest;
    let same = |other: &&Versioned<ImageRecord>| {
        other.value.digest == *digest && other.value.id != row.value.id
    };
    if cx.world.images.values().any(|other| same(&other)) {
        return Ok(txn);
    }
    // Those that are away by their last word, which the row has.
    let mut holders: BTreeSet<NodeId> =
        row.value.nodes.iter().map(|node| NodeId::trusted(node)).collect();
    let holds = cx
        .observed
        .nodes
        .iter()
        .filter(|(_, seen)| seen.images.iter().any(|held| held.digest == *digest));
    holders.extend(holds.map(|(node, _)| node.clone()));
    let known = holders.iter().filter(|node| cx.world.nodes.contains_key(node));
    Ok(known.fold(txn, |txn, node| txn.put(&garbage(node.as_str(), ("", ""), "", digest))))
}
