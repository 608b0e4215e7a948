//! What an operator does to a domain that is there: other sizes, a new disk, rescue, save and
//! restore, and what goes through the agent inside the guest.

use std::collections::BTreeMap;

use drover_proto::v1::{
    DiskResize, DomainState, EndRescueRequest, GetGuestRequest, ReinstallDomainRequest,
    RescueDomainRequest, ResizeDomainRequest, SaveDomainRequest, SetGuestPasswordRequest,
    StartDomainRequest, domain_service_client::DomainServiceClient,
};

use super::{
    Context,
    ask::{confirm, new_password},
    call,
    domain::{follow, get},
    request_id,
};
use crate::{
    args::{Detach, ReinstallArgs, RescueArgs, ResizeArgs},
    error::Error,
    out::{
        human::{enum_name, short},
        json, pages,
    },
};

pub(super) async fn resize(context: &Context, args: ResizeArgs) -> Result<(), Error> {
    let request = ResizeDomainRequest {
        name: args.name.domain,
        request_id: request_id(),
        vcpus: args.vcpus.unwrap_or_default(),
        memory_bytes: args.memory.unwrap_or_default(),
        disks: disk_changes(args.disk, args.limit)?,
    };
    let operation = call!(context, DomainServiceClient::resize_domain, request)?;
    follow(context, operation, &args.detach).await
}

/// One entry a disk, with its size and its limits.
fn disk_changes(sizes: Vec<DiskResize>, limits: Vec<DiskResize>) -> Result<Vec<DiskResize>, Error> {
    let mut changes: BTreeMap<u32, DiskResize> = BTreeMap::new();
    for size in sizes {
        if changes.insert(size.disk, size).is_some() {
            return Err(given_twice("--disk", size.disk));
        }
    }
    for limit in limits {
        let change = changes
            .entry(limit.disk)
            .or_insert_with(|| DiskResize { disk: limit.disk, ..DiskResize::default() });
        if change.limits.is_some() {
            return Err(given_twice("--limit", limit.disk));
        }
        change.limits = limit.limits;
    }
    Ok(changes.into_values().collect())
}

fn given_twice(flag: &str, disk: u32) -> Error {
    Error::Usage(format!("{flag}: disk {disk} is given twice: once is expected"))
}

pub(super) async fn reinstall(context: &Context, args: ReinstallArgs) -> Result<(), Error> {
    let (disk, id) = (args.disk, short(&args.name.domain));
    confirm(args.yes, &format!("what disk {disk} of {id} holds is lost"))?;
    let request = ReinstallDomainRequest {
        name: args.name.domain.clone(),
        request_id: request_id(),
        disk,
        image: args.image.unwrap_or_default(),
        keep_image: false,
    };
    let operation = call!(context, DomainServiceClient::reinstall_domain, request)?;
    follow(context, operation, &args.detach).await
}

pub(super) async fn rescue(context: &Context, args: RescueArgs) -> Result<(), Error> {
    let name = args.name.domain;
    let operation = match args.image {
        Some(image) => {
            let request = RescueDomainRequest { name, request_id: request_id(), image };
            call!(context, DomainServiceClient::rescue_domain, request)?
        }
        None => {
            let request = EndRescueRequest { name, request_id: request_id() };
            call!(context, DomainServiceClient::end_rescue, request)?
        }
    };
    follow(context, operation, &args.detach).await
}

pub(super) async fn save(context: &Context, name: String, detach: &Detach) -> Result<(), Error> {
    let request = SaveDomainRequest { name, request_id: request_id() };
    let operation = call!(context, DomainServiceClient::save_domain, request)?;
    follow(context, operation, detach).await
}

/// The start of a saved domain; any other is not started by this word.
pub(super) async fn restore(context: &Context, name: String, detach: &Detach) -> Result<(), Error> {
    let domain = get(context, &name).await?;
    if domain.state() != DomainState::Saved {
        let state = enum_name(domain.state().as_str_name(), "DOMAIN_STATE_");
        let id = short(&name);
        return Err(Error::Conflict(format!(
            "{id} is {state}: only a saved domain can be restored (vpsctl domain start {id} boots it)"
        )));
    }
    let request = StartDomainRequest { name, request_id: request_id(), discard_saved: false };
    let operation = call!(context, DomainServiceClient::start_domain, request)?;
    follow(context, operation, detach).await
}

pub(super) async fn guest(context: &Context, name: String) -> Result<(), Error> {
    let request = GetGuestRequest { name: name.clone() };
    let guest = call!(context, call_guest, DomainServiceClient::get_guest, request)?;
    context.answer(|| json::object(&guest), || pages::guest(&name, &guest))
}

pub(super) async fn set_password(
    context: &Context,
    name: String,
    user: String,
) -> Result<(), Error> {
    let password = new_password().await?;
    let request = SetGuestPasswordRequest { name: name.clone(), user: user.clone(), password };
    call!(context, call_guest, DomainServiceClient::set_guest_password, request)?;
    let json = || Ok(format!("{}\n", serde_json::json!({ "name": name, "user": user })));
    context.answer(json, || format!("{user} has a new password in {}\n", short(&name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::{disk_limits, disk_size};

    /// Size and limits of a disk are one change of it; the order typed does not matter.
    #[test]
    fn changes_of_a_disk_are_joined() {
        let sizes = vec![disk_size("1=2GiB").unwrap(), disk_size("0=1GiB").unwrap()];
        let limits = vec![disk_limits("1=none").unwrap(), disk_limits("2=iops=5").unwrap()];
        let changes = disk_changes(sizes.clone(), limits.clone()).unwrap();
        assert_eq!(changes.iter().map(|c| c.disk).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!((changes[1].size_bytes, changes[1].limits), (2 << 30, limits[0].limits));
        assert_eq!((changes[2].size_bytes, changes[2].limits), (0, limits[1].limits));
        let twice = disk_changes([sizes.clone(), sizes].concat(), vec![]).unwrap_err();
        assert_eq!(twice.to_string(), "--disk: disk 1 is given twice: once is expected");
        let twice = disk_changes(vec![], [limits.clone(), limits].concat()).unwrap_err();
        assert_eq!(twice.to_string(), "--limit: disk 1 is given twice: once is expected");
    }
}
