//! The control queue: the guest's commands to its device.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::Bytes;

use super::announce::MacAddress;
use super::device::Net;
use crate::memory::GuestMemory;
use crate::virtio::{Progress, Segment, Turn, Violation};

/// Bytes of a command that are looked at: class, command, a MAC address.
const COMMAND_BYTES: usize = 8;
/// Commands in one turn.
const TURN_COMMANDS_MAX: usize = 64;

impl Net {
    /// Carries out the commands in this queue.
    pub(super) fn control(
        &mut self,
        turn: &mut Turn<'_>,
        queue: usize,
    ) -> Result<Progress, Violation> {
        let memory = turn.memory;
        let mut progress = Progress::More;
        turn.queues[queue].disable_kicks(memory)?;
        for _ in 0..TURN_COMMANDS_MAX {
            let Some(head) = turn.queues[queue].pop(memory, &mut self.segments)? else {
                if turn.queues[queue].enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let answer = self.segments.iter().find(|segment| segment.writable);
            let Some(answer) = answer.map(|segment| segment.addr) else {
                let what = "has no room for an answer";
                return Err(Violation::Shape { queue, head, what });
            };
            let done = self.command(memory);
            let ack = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
            // The buffer was checked when it was taken.
            let _ = memory.write_obj(ack, answer);
            turn.queues[queue].complete(memory, head, 1)?;
        }
        turn.queues[queue].notify(memory, turn.interrupt)?;
        Ok(progress)
    }

    /// Carries out the command in `segments`; false when it is not known.
    fn command(&mut self, memory: &GuestMemory) -> bool {
        let (bytes, length) = command_bytes(memory, &self.segments);
        let class_and_command = (u32::from(bytes[0]), u32::from(bytes[1]));
        match class_and_command {
            _ if length < 3 => {
                class_and_command == ANNOUNCE_ACK && length == 2 && {
                    self.announced();
                    true
                }
            }
            // The tap passes every frame: promiscuous or not, the guest filters by itself.
            (VIRTIO_NET_CTRL_RX, _) => true,
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) if length == COMMAND_BYTES => {
                let mac: [u8; 6] = std::array::from_fn(|i| bytes[2 + i]);
                let unicast = mac[0] & 1 == 0 && mac != [0; 6];
                if unicast {
                    self.mac = MacAddress(mac);
                }
                unicast
            }
            // The table of addresses to receive: as above.
            (VIRTIO_NET_CTRL_MAC, _) => true,
            ANNOUNCE_ACK => {
                self.announced();
                true
            }
            _ => false,
        }
    }
}

const ANNOUNCE_ACK: (u32, u32) = (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK);

/// The first bytes of the readable segments, and how many there were.
fn command_bytes(memory: &GuestMemory, segments: &[Segment]) -> ([u8; COMMAND_BYTES], usize) {
    let mut bytes = [0; COMMAND_BYTES];
    let mut length = 0;
    for segment in segments.iter().filter(|segment| !segment.writable) {
        let room = (COMMAND_BYTES - length).min(segment.len as usize);
        if memory.read_slice(&mut bytes[length..length + room], segment.addr).is_err() {
            break;
        }
        length += room;
    }
    (bytes, length)
}
