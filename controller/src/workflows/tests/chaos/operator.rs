//! Somebody who uses the API at random.

use drover_proto::v1::DiskResize;

use super::{Chaos, DOMAINS, MIB, NODES, SNAPSHOTS};
use crate::model::{DomainId, ImageId, NodeId, SnapshotId, SnapshotRecord, VolumeId, VolumeRecord};
use crate::scheduler::Strategy;
use crate::workflows::reinstall::reinstall_domain;
use crate::workflows::rescue::{end_rescue, rescue_domain};
use crate::workflows::resize::{Resize, resize_domain};
use crate::workflows::save::save_domain;
use crate::workflows::snapshot::{create_snapshot, delete_snapshot, restore_snapshot};
use crate::workflows::tests::lab::{limits, split};
use crate::workflows::volumes::{NewVolume, create_volume, delete_volume};
use crate::workflows::{Refusal, begin, drain, nodes};

impl Chaos {
    /// Somebody uses the API; most is refused, as it should be.
    pub(super) fn operator(&mut self) {
        let domain = DomainId::trusted(DOMAINS[self.dice.below(3)]);
        let node = NodeId::trusted(NODES[self.dice.below(3)]);
        let done = match self.dice.below(40) {
            0..=5 => self
                .lab
                .with(|cx| begin::migrate_domain(cx, &domain, Some(&node), &limits()).map(split))
                .map(|_| format!("migrate {domain} to {node}")),
            6 => self
                .lab
                .with(|cx| begin::start_domain(cx, &domain, false).map(split))
                .map(|_| format!("start {domain}")),
            8 => {
                let wait = 120_000;
                self.lab
                    .with(|cx| {
                        drain::begin_drain(cx, &node, &limits(), wait, Strategy::BestFit).map(split)
                    })
                    .map(|_| format!("drain {node}"))
            }
            9 => self
                .lab
                .with(|cx| nodes::set_cordon(cx, &node, false))
                .map(|_| format!("uncordon {node}")),
            10..=12 => {
                let world = self.lab.world();
                let ids: Vec<_> = world.operations.keys().cloned().collect();
                if ids.is_empty() {
                    return;
                }
                let id = ids[self.dice.below(ids.len())].clone();
                self.lab.cancel(id.as_str()).map(|()| format!("cancel {id}"))
            }
            7 | 13..=19 => self.verb(&domain),
            20..=27 => self.keep(&domain, &node),
            _ => return,
        };
        if let Ok(text) = done {
            self.note(text);
        }
    }

    /// Snapshots, and a volume that no domain has.
    fn keep(&mut self, domain: &DomainId, node: &NodeId) -> Result<String, Refusal> {
        let id = SnapshotId::trusted(SNAPSHOTS[self.dice.below(3)]);
        let spare = VolumeId::trusted("spare");
        match self.dice.below(8) {
            0..=2 => self
                .lab
                .with(|cx| create_snapshot(cx, &id, domain).map(split))
                .map(|_| format!("take {id} of {domain}")),
            3 => self
                .lab
                .with(|cx| delete_snapshot(cx, &id, "").map(|txn| (txn, ())))
                .map(|()| format!("delete {id}")),
            4 | 5 => {
                self.lab.with(|cx| restore_snapshot(cx, &id).map(split)).map(|_| self.restored(&id))
            }
            6 => {
                let (pool, image) = (String::new(), String::new());
                let only = Some(node.clone());
                let new = NewVolume { id: spare, pool, size_bytes: MIB, image, only };
                self.lab
                    .with(|cx| create_volume(cx, &new).map(split))
                    .map(|_| "make the spare volume".to_owned())
            }
            _ => self
                .lab
                .with(|cx| delete_volume(cx, &spare, "").map(|txn| (txn, ())))
                .map(|()| "delete the spare volume".to_owned()),
        }
    }

    /// The domain's new disk holds what the snapshot does.
    fn restored(&mut self, id: &SnapshotId) -> String {
        let view = self.lab.view();
        let row = view.get::<SnapshotRecord>(id.as_str()).unwrap().value;
        let host = NODES.iter().position(|name| *name == row.node).unwrap();
        let Some(writes) = self.hosts[host].parts.get(&row.parts[0].uid).copied() else {
            self.fail(&format!("{id} is READY and not there"));
        };
        let volume = view.get::<VolumeRecord>(&row.parts[0].volume).unwrap().value;
        self.writes.insert(volume.uid, writes);
        format!("put {} back to {id}, {writes} writes", row.domain)
    }

    fn verb(&mut self, domain: &DomainId) -> Result<String, Refusal> {
        let id = domain.as_str();
        let image = ImageId::trusted("image");
        let memory = self.lab.view().get::<VolumeRecord>(&format!("{id}-memory"));
        let verb = self.dice.below(7);
        let size_bytes = MIB * (1 + self.dice.below(8) as u64);
        let disks = vec![DiskResize { size_bytes, ..DiskResize::default() }];
        let resize = Resize { vcpus: 1 + self.dice.below(2) as u32, disks, ..Resize::default() };
        let begun = self.lab.with(|cx| {
            let begun = match verb {
                0 => resize_domain(cx, domain, &resize),
                1 => reinstall_domain(cx, domain, 0, Some(&image), false),
                2 => rescue_domain(cx, domain, &image),
                3 => end_rescue(cx, domain),
                4 => save_domain(cx, domain),
                5 => begin::start_domain(cx, domain, true),
                _ => begin::stop_domain(cx, domain, 0),
            };
            begun.map(split)
        })?;
        if verb > 4 {
            self.unwanted.extend(memory.map(|row| row.value.uid));
        }
        Ok(format!("{} {domain}", begun.kind().as_str_name()))
    }
}
