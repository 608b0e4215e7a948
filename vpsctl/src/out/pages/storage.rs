//! Pools, volumes and images.

use std::collections::{BTreeMap, BTreeSet};
use std::{fmt::Write, time::SystemTime};

use drover_proto::v1::{Image, Pool, PoolState, Volume};

use super::{Page, with_reason};
use crate::out::{
    human::{age, enum_name, or_dash, short, short_or_dash, size},
    table::Table,
};

/// So much of a digest tells images apart.
const DIGEST_SHOWN: usize = 12;

/// The pools with their room, and below them why some cannot be used.
pub(crate) fn pools(pools: &[Pool]) -> String {
    let mut table =
        Table::new(&["NODE", "POOL", "KIND", "STATE", "SIZE", "USED", "PROMISED", "VOLUMES"]);
    let mut troubles = String::new();
    let mut shared = BTreeMap::new();
    for pool in pools {
        let (node, id) = place(pool);
        if !pool.shared_uid.is_empty() {
            let others = pool.shared_with.iter().map(|other| short(other).to_owned());
            let all: BTreeSet<String> = others.chain([node.clone()]).collect();
            let all = all.into_iter().collect::<Vec<_>>().join(", ");
            let words = match pool.shared_with.len() {
                0 => format!("pool {id} can be shared, and only {all} has it so far"),
                _ => format!("pool {id} is one pool, shared by {all}: its figures count once"),
            };
            shared.entry(&pool.shared_uid).or_insert(words);
        }
        let state = pool_state(pool);
        if !is_ready(pool) {
            let why = with_reason(&state, &pool.state_reason).replace(['\n', '\r'], " ");
            let _ = writeln!(troubles, "{node}: pool {id} is {why}");
        }
        table.row(vec![
            node,
            id,
            kind(pool),
            state,
            size(pool.size_bytes),
            format!("{}, {}", size(pool.used_bytes), percent(pool.used_bytes, pool.size_bytes)),
            promised(pool),
            pool.volume_count.to_string(),
        ]);
    }
    let mut text = table.render();
    let shared: String = shared.into_values().map(|words| format!("{words}\n")).collect();
    for more in [shared, troubles] {
        if !more.is_empty() {
            text = format!("{text}\n{more}");
        }
    }
    text
}

fn kind(pool: &Pool) -> String {
    let kind = enum_name(pool.kind().as_str_name(), "POOL_KIND_");
    if pool.shared_uid.is_empty() { kind } else { format!("{kind}, shared") }
}

/// `nodes/host1/pools/ssd` is `host1` and `ssd`.
fn place(pool: &Pool) -> (String, String) {
    match pool.name.split('/').collect::<Vec<_>>()[..] {
        ["nodes", node, "pools", id] => (node.to_owned(), id.to_owned()),
        _ => ("-".to_owned(), pool.name.clone()),
    }
}

fn is_ready(pool: &Pool) -> bool {
    pool.state() == PoolState::Ready
}

/// In capitals where somebody should look.
fn pool_state(pool: &Pool) -> String {
    let state = enum_name(pool.state().as_str_name(), "POOL_STATE_");
    if is_ready(pool) { state } else { state.to_ascii_uppercase() }
}

/// `1.5 TiB of 2 TiB`: of what may be promised, not of what is there.
fn promised(pool: &Pool) -> String {
    // A product of floats that does not fit becomes the largest number; none, 0.
    match (pool.size_bytes as f64 * pool.overcommit) as u64 {
        0 => size(pool.promised_bytes),
        promisable => format!("{} of {}", size(pool.promised_bytes), size(promisable)),
    }
}

fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        _ => format!("{:.0}%", part as f64 * 100.0 / whole as f64),
    }
}

/// LVM cannot tell what a volume takes that nobody has open.
pub(super) fn takes(allocated_bytes: u64) -> String {
    if allocated_bytes == 0 { "-".to_owned() } else { size(allocated_bytes) }
}

/// The volumes, whose they are and where they lie.
pub(crate) fn volumes(volumes: &[Volume], now: SystemTime) -> String {
    let header =
        ["NAME", "STATE", "DOMAIN", "NODE", "POOL", "SIZE", "TAKES", "IMAGE", "AGE", "REASON"];
    let mut table = Table::new(&header);
    for volume in volumes {
        table.row(vec![
            short(&volume.name).to_owned(),
            enum_name(volume.state().as_str_name(), "VOLUME_STATE_"),
            short_or_dash(&volume.domain),
            short_or_dash(&volume.node),
            or_dash(&volume.pool),
            size(volume.size_bytes),
            takes(volume.allocated_bytes),
            short_or_dash(&volume.image),
            age(volume.create_time.as_ref(), now),
            volume.state_reason.clone(),
        ]);
    }
    table.render()
}

/// One volume.
pub(crate) fn volume(volume: &Volume, now: SystemTime) -> String {
    let mut page = Page::default();
    page.line("volume", short(&volume.name));
    let state = enum_name(volume.state().as_str_name(), "VOLUME_STATE_");
    page.line("state", &with_reason(&state, &volume.state_reason));
    page.line("domain", &short_or_dash(&volume.domain));
    page.line("node", &short_or_dash(&volume.node));
    page.line("pool", &volume.pool);
    let takes = match volume.allocated_bytes {
        0 => String::new(),
        bytes => format!(", takes {} in the pool", size(bytes)),
    };
    page.line("size", &format!("{}{takes}", size(volume.size_bytes)));
    page.line("image", &short_or_dash(&volume.image));
    page.line("created", &format!("{} ago", age(volume.create_time.as_ref(), now)));
    page.line("uid", &volume.uid);
    page.text
}

/// The images and where copies of them lie.
pub(crate) fn images(images: &[Image], now: SystemTime) -> String {
    let mut table = Table::new(&["NAME", "SIZE", "DIGEST", "NODES", "AGE"]);
    for image in images {
        table.row(vec![
            short(&image.name).to_owned(),
            size(image.size_bytes),
            or_dash(&image.digest.chars().take(DIGEST_SHOWN).collect::<String>()),
            or_dash(&nodes(image)),
            age(image.create_time.as_ref(), now),
        ]);
    }
    table.render()
}

fn nodes(image: &Image) -> String {
    image.nodes.iter().map(|node| short(node)).collect::<Vec<_>>().join(" ")
}

/// One image.
pub(crate) fn image(image: &Image, now: SystemTime) -> String {
    let mut page = Page::default();
    page.line("image", short(&image.name));
    page.line("size", &size(image.size_bytes));
    page.line("digest", &image.digest);
    page.line("copies on", &nodes(image));
    page.line("created", &format!("{} ago", age(image.create_time.as_ref(), now)));
    page.text
}

/// One sentence on an image that has been imported.
pub(crate) fn imported(image: &Image) -> String {
    let on = if image.nodes.is_empty() { String::new() } else { format!(" on {}", nodes(image)) };
    let (name, size) = (short(&image.name), size(image.size_bytes));
    format!("{name} is imported{on}: {size}, digest {}\n", image.digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(node: &str, state: PoolState, reason: &str) -> Pool {
        let mut pool = Pool {
            name: format!("nodes/{node}/pools/ssd"),
            state_reason: reason.to_owned(),
            size_bytes: 1 << 40,
            used_bytes: 400 << 30,
            promised_bytes: 3 << 39,
            overcommit: 2.0,
            volume_count: 12,
            ..Pool::default()
        };
        pool.set_kind(drover_proto::v1::PoolKind::Lvm);
        pool.set_state(state);
        pool
    }

    /// What cannot take volumes stands out and says why; else the table is all.
    #[test]
    fn a_pool_in_trouble_stands_out() {
        let ready = pool("host1", PoolState::Ready, "");
        let filling = pool("host2", PoolState::Filling, "its data is 85% full,\nits limit is 80%");
        let expected = "\
NODE    POOL   KIND   STATE     SIZE    USED           PROMISED           VOLUMES
host1   ssd    lvm    ready     1 TiB   400 GiB, 39%   1.5 TiB of 2 TiB   12
host2   ssd    lvm    FILLING   1 TiB   400 GiB, 39%   1.5 TiB of 2 TiB   12

host2: pool ssd is FILLING: its data is 85% full, its limit is 80%
";
        assert_eq!(pools(&[ready.clone(), filling]), expected);
        assert_eq!(pools(&[ready]).lines().count(), 2);
    }

    /// Two rows, one pool.
    #[test]
    fn who_shares_a_pool_is_said_once() {
        let one = |node: &str, other: &str| Pool {
            shared_uid: "0b6c9c0e".to_owned(),
            shared_with: vec![format!("nodes/{other}")],
            ..pool(node, PoolState::Ready, "")
        };
        let text = pools(&[one("host1", "host2"), one("host2", "host1")]);
        assert_eq!(text.matches("lvm, shared").count(), 2, "{text}");
        let words = "\npool ssd is one pool, shared by host1, host2: its figures count once\n";
        assert!(text.ends_with(words), "{text}");
        assert_eq!(text.matches("shared by").count(), 1, "{text}");
    }

    /// A pool that could not even be measured.
    #[test]
    fn a_failed_pool_has_no_figures() {
        let mut failed = pool("host1", PoolState::Failed, "no volume group vg0");
        (failed.size_bytes, failed.used_bytes, failed.overcommit) = (0, 0, f64::NAN);
        let text = pools(&[failed]);
        assert!(text.contains("FAILED   0 B    0 B, -   1.5 TiB    12"), "{text}");
        assert!(text.ends_with("\nhost1: pool ssd is FAILED: no volume group vg0\n"), "{text}");
    }

    #[test]
    fn an_image_says_where_it_lies() {
        let it = Image {
            name: "images/debian13".to_owned(),
            digest: "e3b0c44298fc1c149afbf4c8996fb924".to_owned(),
            size_bytes: 3 << 30,
            nodes: vec!["nodes/host1".to_owned(), "nodes/host2".to_owned()],
            ..Image::default()
        };
        let now = SystemTime::UNIX_EPOCH;
        let row = "debian13   3 GiB   e3b0c44298fc   host1 host2   -";
        assert_eq!(images(std::slice::from_ref(&it), now).lines().last(), Some(row));
        assert!(image(&it, now).contains("copies on     host1 host2\n"));
        assert!(
            imported(&it).starts_with("debian13 is imported on host1 host2: 3 GiB, digest e3b0")
        );
    }
}
