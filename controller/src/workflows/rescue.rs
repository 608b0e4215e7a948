//! A domain that boots an image instead of its own disks, which come behind it: to be repaired.
//!
//! The rescue disk is a volume beside the domain's own, `{id}-rescue`. While the row names the
//! rescue image, every start boots it, and it moves with the domain; EndRescue removes it.

use drover_proto::v1::{EventSeverity, OperationKind, OperationState};

use super::begin::{Begun, FILL_WAIT_MS, hold, operation, wrong_state};
use super::content::{MIB, Source, discard, new_volume, resting};
use super::power::starts;
use super::refusal::Refusal;
use super::resize::room;
use super::step::{Context, end};
use crate::model::{DomainId, ImageId, is_rescued, rescue_volume};
use crate::scheduler::{PoolNeeds, Resources};
use crate::store::Txn;

/// With the rescue disk and the seed, as many as a guest can have.
const DISKS_MAX: usize = 6;

/// Starts a domain from a rescue image.
///
/// # Errors
/// There is no such domain or image; the domain is held, not at rest, being rescued already, has no
/// disks or too many; its node is lost or has no room.
pub fn rescue_domain(cx: &Context<'_>, id: &DomainId, image: &ImageId) -> Result<Begun, Refusal> {
    let row = resting(cx, id)?;
    let refuse = |reason, message: String| {
        Err(Refusal::Precondition { subject: id.name(), reason, message })
    };
    if is_rescued(&row.value) {
        let held = &row.value.rescue_image;
        let message = format!(
            "{} has a rescue disk of images/{held} already: start it, or end the rescue first",
            id.name()
        );
        return refuse("RESCUED", message);
    }
    if cx.is_lost(&row.value.node) {
        return Err(wrong_state(id, &row.value, "its node is lost: wait until it is back"));
    }
    let disks = row.value.spec.as_ref().map_or(0, |spec| spec.disks.len());
    if disks > DISKS_MAX {
        let message = format!(
            "{} has {disks} disks and a rescue disk needs a place: detach one, so that it has at \
             most {DISKS_MAX}",
            id.name()
        );
        return refuse("TOO_MANY_DISKS", message);
    }
    let Some((_, first)) = cx.world.disks_of(&row.value).next() else {
        return refuse("NO_DISKS", format!("{} has no disks that could be rescued", id.name()));
    };
    let source = cx.world.images.get(image.as_str());
    let source = &source.ok_or_else(|| Refusal::NotFound { name: image.name() })?.value;
    let (pool, size_bytes) = (&first.value.pool, source.size_bytes.next_multiple_of(MIB));
    let more = PoolNeeds::from([(pool.clone(), size_bytes)]);
    let txn = room(cx, Txn::new(), &row.value, Resources::default(), &more)?;
    let volume = rescue_volume(id.as_str());
    let place = (pool.as_str(), size_bytes);
    let (txn, _) = new_volume(cx, txn, &row.value, &volume, place, Source::Image(source))?;
    let mut domain = row.value.clone();
    domain.rescue_image = image.as_str().to_owned();
    starts(cx, &mut domain);
    let operation = operation(cx, OperationKind::RescueDomain, id.name(), FILL_WAIT_MS);
    let message = format!("with {}", image.name());
    let event = cx.event(EventSeverity::Info, id.name(), "DOMAIN_RESCUED", message);
    Ok(hold(cx, txn.put(&event), row, domain, operation))
}

/// Removes the rescue disk of a domain that is at rest.
///
/// # Errors
/// There is no such domain; it is held, not at rest, or not being rescued.
pub fn end_rescue(cx: &Context<'_>, id: &DomainId) -> Result<Begun, Refusal> {
    let row = resting(cx, id)?;
    if !is_rescued(&row.value) {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "NOT_RESCUED",
            message: format!("{} has no rescue disk: nothing is to be ended", id.name()),
        });
    }
    let mut domain = row.value.clone();
    domain.rescue_image.clear();
    let mut operation = operation(cx, OperationKind::EndRescue, id.name(), 0);
    end(&mut operation, OperationState::Succeeded, None, cx.now);
    let event = cx.event(EventSeverity::Info, id.name(), "RESCUE_ENDED", String::new());
    let mut txn = Txn::new().term_is(cx.term).unchanged(row).put(&domain).put(&operation);
    if let Some(volume) = cx.world.rescue_of(&row.value) {
        txn = discard(cx, txn, &row.value.node, volume);
    }
    Ok(Begun { txn: txn.put(&event), operation })
}
