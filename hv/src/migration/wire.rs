//! The messages between source and destination, as `docs/migration-format.md` has them.

use super::features::{DISKS_MAX, Shape};
use crate::memory::PAGE_BYTES;
use crate::state::{Decoder, Encoder, STATE_BYTES_MAX, StateError};

/// The protocol's version; both sides must speak the same.
pub const PROTOCOL_VERSION: u16 = 3;
/// Begins each message, so that a stream out of step is noticed at once.
const MAGIC: [u8; 4] = *b"DRVM";
/// magic, kind, reserved, length.
pub const HEADER_BYTES: usize = 12;
/// start, pages, what they hold.
pub const RUN_BYTES: usize = 16;
/// Most runs in a message: with the header, fewer buffers than one `writev` takes.
pub const RUNS_MAX: usize = 512;
/// Most bytes of page data in a message.
pub const DATA_BYTES_MAX: usize = 1 << 20;
/// disk, what they hold, offset, bytes.
pub const EXTENT_BYTES: usize = 24;
/// Most extents in a message.
pub const EXTENTS_MAX: usize = 512;
/// Longest text of a refusal.
const REASON_BYTES_MAX: usize = 1024;
const ID_BYTES_MAX: usize = 128;
const TOKEN_BYTES_MAX: usize = 256;
const HELLO_BYTES_MAX: usize = 8192;
const JOIN_BYTES_MAX: usize = 4 + ID_BYTES_MAX + 4 + TOKEN_BYTES_MAX + 2;
/// Most connections of a migration.
pub const CONNECTIONS_MAX: u16 = 16;
/// What disks are counted in.
const SECTOR_BYTES: u64 = 512;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Source: who, and of what shape.
    Hello = 1,
    /// Destination: go on.
    Welcome = 2,
    /// Destination: no, and why.
    Refuse = 3,
    /// Source: pages.
    Pages = 4,
    /// Source: the pass is over.
    Round = 5,
    /// Destination: every page of the pass is in memory.
    RoundAck = 6,
    /// Source: the state of the machine; no page follows.
    State = 7,
    /// Destination: restored and verified.
    Ready = 8,
    /// Source: handed over.
    Commit = 9,
    /// Destination: the guest runs.
    Running = 10,
    /// Either, before the hand-over: it is off, and why.
    Abort = 11,
    /// Source: a state of the machine while it runs, for the destination to practise with.
    Rehearsal = 12,
    /// Destination: restored it.
    Rehearsed = 13,
    /// Source: the guest stands still here; its frames are the destination's from now on.
    Paused = 14,
    /// Source: what disks hold; without any, a sign of life.
    Disk = 15,
    /// Source, on a further connection: which migration, and which connection of it.
    Join = 16,
    /// Destination: it belongs to it.
    Joined = 17,
}

impl Kind {
    const ALL: [Self; 17] = [
        Self::Hello,
        Self::Welcome,
        Self::Refuse,
        Self::Pages,
        Self::Round,
        Self::RoundAck,
        Self::State,
        Self::Ready,
        Self::Commit,
        Self::Running,
        Self::Abort,
        Self::Rehearsal,
        Self::Rehearsed,
        Self::Paused,
        Self::Disk,
        Self::Join,
        Self::Joined,
    ];

    fn length_max(self) -> usize {
        match self {
            Self::Hello => HELLO_BYTES_MAX,
            Self::Refuse | Self::Abort => 4 + REASON_BYTES_MAX,
            Self::Pages => 4 + RUNS_MAX * RUN_BYTES + DATA_BYTES_MAX,
            Self::Disk => 4 + EXTENTS_MAX * EXTENT_BYTES + DATA_BYTES_MAX,
            Self::Join => JOIN_BYTES_MAX,
            Self::Welcome => 1 + DISKS_MAX,
            Self::Round | Self::RoundAck => 4 + Sent::BYTES,
            Self::State => Sent::BYTES + STATE_BYTES_MAX,
            Self::Rehearsal => STATE_BYTES_MAX,
            Self::Ready
            | Self::Commit
            | Self::Running
            | Self::Rehearsed
            | Self::Paused
            | Self::Joined => 0,
        }
    }
}

/// Pages that lie behind each other and hold the same kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Guest-physical address of the first page.
    pub start: u64,
    /// How many.
    pub pages: u32,
    /// They hold zeros, which are not sent.
    pub zero: bool,
}

impl Run {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }
}

/// HELLO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Unique in the cluster.
    pub migration_id: String,
    /// Known to the two sides of this migration alone.
    pub token: String,
    /// The epoch under which the destination will run the domain.
    pub to_epoch: u64,
    /// The source's machine.
    pub shape: Shape,
}

impl Hello {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::new();
        out.u16(PROTOCOL_VERSION);
        out.bytes(self.migration_id.as_bytes());
        out.bytes(self.token.as_bytes());
        out.u64(self.to_epoch);
        self.shape.encode(&mut out);
        out.into_bytes()
    }

    /// Reads a payload.
    pub fn decode(payload: &[u8]) -> Result<Self, StateError> {
        let mut fields = Decoder::new(payload);
        let version = fields.u16("protocol version")?;
        if version != PROTOCOL_VERSION {
            let accepted = PROTOCOL_VERSION.to_string();
            return Err(StateError::value("protocol version", version, accepted));
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let hello = Self {
            migration_id: text(fields.bytes("migration id", ID_BYTES_MAX)?),
            token: text(fields.bytes("token", TOKEN_BYTES_MAX)?),
            to_epoch: fields.u64("to_epoch")?,
            shape: Shape::decode(&mut fields)?,
        };
        fields.finish("hello")?;
        Ok(hello)
    }
}

/// JOIN: what comes on this connection belongs to that migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// As in HELLO.
    pub migration_id: String,
    /// As in HELLO.
    pub token: String,
    /// Which connection, from 1; that of HELLO is 0.
    pub index: u16,
}

impl Join {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::new();
        out.bytes(self.migration_id.as_bytes());
        out.bytes(self.token.as_bytes());
        out.u16(self.index);
        out.into_bytes()
    }

    /// Reads a payload.
    pub fn decode(payload: &[u8]) -> Result<Self, StateError> {
        let mut fields = Decoder::new(payload);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let join = Self {
            migration_id: text(fields.bytes("migration id", ID_BYTES_MAX)?),
            token: text(fields.bytes("token", TOKEN_BYTES_MAX)?),
            index: fields.u16("connection index")?,
        };
        fields.finish("join")?;
        Ok(join)
    }
}

/// A message's header.
pub fn header(kind: Kind, length: usize) -> [u8; HEADER_BYTES] {
    debug_assert!(length <= kind.length_max());
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&(kind as u16).to_le_bytes());
    header[8..].copy_from_slice(&(length as u32).to_le_bytes());
    header
}

/// The header of a HELLO, whose sender offers so many connections, or of a WELCOME, whose sender
/// takes so many. Whoever does not know of this leaves 0 there, and does not look.
pub fn greeting(kind: Kind, length: usize, connections: u16) -> [u8; HEADER_BYTES] {
    debug_assert!(matches!(kind, Kind::Hello | Kind::Welcome));
    let mut header = header(kind, length);
    header[6..8].copy_from_slice(&connections.to_le_bytes());
    header
}

/// Of a HELLO's or WELCOME's header: how many connections; at least one, at most
/// [`CONNECTIONS_MAX`].
pub fn connections(header: &[u8; HEADER_BYTES]) -> u16 {
    u16::from_le_bytes([header[6], header[7]]).clamp(1, CONNECTIONS_MAX)
}

/// Reads a header: the message's kind and its payload's length, which is within its bounds.
pub fn parse_header(header: [u8; HEADER_BYTES]) -> Result<(Kind, usize), StateError> {
    let mut fields = Decoder::new(&header);
    let magic = fields.array::<4>("message magic")?;
    if magic != MAGIC {
        return Err(StateError::value(
            "message magic",
            format_args!("{magic:02x?}"),
            "\"DRVM\": the other side speaks another protocol",
        ));
    }
    let number = fields.u16("message kind")?;
    let kind = Kind::ALL.into_iter().find(|kind| *kind as u16 == number);
    let kind = kind.ok_or_else(|| StateError::value("message kind", number, "1 to 17"))?;
    fields.u16("reserved")?;
    let value = fields.u32("message length")? as usize;
    let limit = kind.length_max();
    if value > limit {
        return Err(StateError::TooLarge { field: "message length", value, limit });
    }
    Ok((kind, value))
}

/// The table that begins a PAGES message.
pub fn encode_runs(runs: &[Run]) -> Vec<u8> {
    debug_assert!(runs.len() <= RUNS_MAX);
    let mut out = Encoder::new();
    out.u32(runs.len() as u32);
    for run in runs {
        out.u64(run.start);
        out.u32(run.pages);
        out.u32(u32::from(run.zero));
    }
    out.into_bytes()
}

/// Reads a table of `count` runs, whose data are exactly `data_bytes` long.
pub fn decode_runs(table: &[u8], count: usize, data_bytes: usize) -> Result<Vec<Run>, StateError> {
    if count > RUNS_MAX {
        return Err(StateError::TooLarge { field: "runs", value: count, limit: RUNS_MAX });
    }
    let mut fields = Decoder::new(table);
    let mut runs = Vec::with_capacity(count);
    let mut sent = 0u64;
    for _ in 0..count {
        let start = fields.u64("run start")?;
        let pages = fields.u32("run pages")?;
        let zero = match fields.u32("run content")? {
            0 => false,
            1 => true,
            other => return Err(StateError::value("run content", other, "0 or 1")),
        };
        let run = Run { start, pages, zero };
        if pages == 0 || !start.is_multiple_of(PAGE_BYTES) {
            return Err(StateError::value("run", format_args!("{run:?}"), "whole pages"));
        }
        sent += if zero { 0 } else { run.bytes() };
        runs.push(run);
    }
    fields.finish("runs")?;
    if sent != data_bytes as u64 {
        return Err(StateError::value("page data", data_bytes, format!("{sent} bytes")));
    }
    Ok(runs)
}

/// Bytes of a disk that lie behind each other and hold the same kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Which disk, in the shape's order.
    pub disk: u32,
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
    /// They are zero, and are not sent.
    pub zero: bool,
}

/// A DISK message that tells of nothing: a sign of life.
pub const EXTENTS_NONE: [u8; 4] = [0; 4];

/// The table that begins a DISK message.
pub fn encode_extents(extents: &[Extent]) -> Vec<u8> {
    debug_assert!(extents.len() <= EXTENTS_MAX);
    let mut out = Encoder::new();
    out.u32(extents.len() as u32);
    for extent in extents {
        out.u32(extent.disk);
        out.u32(u32::from(extent.zero));
        out.u64(extent.offset);
        out.u64(extent.bytes);
    }
    out.into_bytes()
}

/// Reads a table of `count` extents, whose data are exactly `data_bytes` long. Whether they lie
/// within their disks is the caller's to check.
pub fn decode_extents(
    table: &[u8],
    count: usize,
    data_bytes: usize,
) -> Result<Vec<Extent>, StateError> {
    if count > EXTENTS_MAX {
        return Err(StateError::TooLarge { field: "extents", value: count, limit: EXTENTS_MAX });
    }
    let mut fields = Decoder::new(table);
    let mut extents = Vec::with_capacity(count);
    let mut sent = 0u64;
    for _ in 0..count {
        let disk = fields.u32("extent disk")?;
        let zero = match fields.u32("extent content")? {
            0 => false,
            1 => true,
            other => return Err(StateError::value("extent content", other, "0 or 1")),
        };
        let (offset, bytes) = (fields.u64("extent offset")?, fields.u64("extent bytes")?);
        let extent = Extent { disk, offset, bytes, zero };
        let whole = bytes.is_multiple_of(SECTOR_BYTES) && offset.is_multiple_of(SECTOR_BYTES);
        if bytes == 0 || !whole || offset.checked_add(bytes).is_none() {
            let accepted = "whole sectors of 512 bytes, at least one";
            return Err(StateError::value("extent", format_args!("{extent:?}"), accepted));
        }
        sent = sent.saturating_add(if zero { 0 } else { bytes });
        extents.push(extent);
    }
    fields.finish("extents")?;
    if sent != data_bytes as u64 {
        return Err(StateError::value("disk data", data_bytes, format!("{sent} bytes")));
    }
    Ok(extents)
}

/// WELCOME: whether each disk here reads as zeros, so that zeros need not be sent.
pub fn encode_welcome(zeroed: &[bool]) -> Vec<u8> {
    debug_assert!(zeroed.len() <= DISKS_MAX);
    let mut out = Encoder::new();
    out.u8(zeroed.len() as u8);
    zeroed.iter().for_each(|zeroed| out.bool(*zeroed));
    out.into_bytes()
}

/// Reads a WELCOME for so many disks.
pub fn decode_welcome(payload: &[u8], disks: usize) -> Result<Vec<bool>, StateError> {
    let mut fields = Decoder::new(payload);
    let count = fields.u8("disks")?;
    if usize::from(count) != disks {
        return Err(StateError::value("disks", count, disks.to_string()));
    }
    let zeroed = (0..count).map(|_| fields.bool("disk zeroed")).collect::<Result<_, _>>()?;
    fields.finish("welcome")?;
    Ok(zeroed)
}

/// How much was sent since HELLO, zeros included: both sides count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages of memory.
    pub pages: u64,
    /// Bytes of disks.
    pub disk_bytes: u64,
}

impl Sent {
    /// Its length on the wire.
    pub const BYTES: usize = 16;

    /// As ROUND and STATE have it.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[8..].copy_from_slice(&self.disk_bytes.to_le_bytes());
        bytes
    }

    /// Adds what another message tells of.
    pub fn add(&mut self, other: Self) {
        self.pages = self.pages.saturating_add(other.pages);
        self.disk_bytes = self.disk_bytes.saturating_add(other.disk_bytes);
    }

    /// Whether this much has come where so much was said to be sent. Messages of one connection
    /// arrive in their order, those of several do not: what the others bring may be late, and
    /// what was sent later may be here. So the one who sends stands still until it is answered
    /// where the answer shall mean that all is here.
    pub fn reaches(self, said: Self) -> bool {
        self.pages >= said.pages && self.disk_bytes >= said.disk_bytes
    }

    /// Reads it from a message's front; answers the rest too.
    pub fn decode(payload: &[u8]) -> Result<(Self, &[u8]), StateError> {
        let mut fields = Decoder::new(payload);
        let sent = Self { pages: fields.u64("pages sent")?, disk_bytes: fields.u64("disk bytes")? };
        Ok((sent, &payload[Self::BYTES..]))
    }
}

/// ROUND and ROUND_ACK: which pass, and how much was sent until its end.
pub fn encode_round(round: u32, sent: Sent) -> Vec<u8> {
    let mut out = Encoder::new();
    out.u32(round);
    out.raw(&sent.encode());
    out.into_bytes()
}

/// Reads a ROUND or ROUND_ACK.
pub fn decode_round(payload: &[u8]) -> Result<(u32, Sent), StateError> {
    let mut fields = Decoder::new(payload);
    let round = fields.u32("round")?;
    let (sent, _) = Sent::decode(fields.raw("round", Sent::BYTES)?)?;
    fields.finish("round")?;
    Ok((round, sent))
}

/// REFUSE and ABORT: a text.
pub fn encode_reason(reason: &str) -> Vec<u8> {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = Encoder::new();
    out.bytes(&reason.as_bytes()[..end]);
    out.into_bytes()
}

/// Reads a REFUSE or ABORT; control characters are replaced, as it goes to a person's terminal.
pub fn decode_reason(payload: &[u8]) -> Result<String, StateError> {
    let mut fields = Decoder::new(payload);
    let text = String::from_utf8_lossy(fields.bytes("reason", REASON_BYTES_MAX)?).into_owned();
    fields.finish("reason")?;
    Ok(text.replace(char::is_control, " "))
}

/// Whether two secrets are the same, in a time that does not tell where they differ.
pub fn same_secret(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::migration::DiskShape;

    fn hello() -> Hello {
        Hello {
            migration_id: "m".into(),
            token: "t".into(),
            to_epoch: 7,
            shape: Shape {
                uid: "u".into(),
                vcpus: 2,
                memory_bytes: 1 << 27,
                interfaces: vec![[2; 6]],
                disks: vec![DiskShape { serial: "s".into(), bytes: 512, ..Default::default() }],
                cpu_features: vec![],
            },
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = (Hello::decode(&bytes), Join::decode(&bytes));
            let _ = decode_round(&bytes);
            let _ = decode_reason(&bytes);
            let _ = decode_runs(&bytes, bytes.len() / RUN_BYTES, 4096);
            let _ = decode_extents(&bytes, bytes.len() / EXTENT_BYTES, 4096);
            let _ = (decode_welcome(&bytes, 2), Sent::decode(&bytes));
            if let Some(header) = bytes.first_chunk() {
                let _ = parse_header(*header);
            }
            let mut framed = header(Kind::Abort, 0);
            for (to, from) in framed[4..].iter_mut().zip(&bytes) {
                *to = *from;
            }
            if let Ok((kind, length)) = parse_header(framed) {
                prop_assert!(length <= kind.length_max());
            }
        }

        #[test]
        fn runs_are_read_as_written(
            runs in prop::collection::vec((0u64..1 << 40, 1u32..9, any::<bool>()), 0..40),
        ) {
            let runs: Vec<Run> = runs
                .into_iter()
                .map(|(page, pages, zero)| Run { start: page * PAGE_BYTES, pages, zero })
                .collect();
            let data: u64 = runs.iter().filter(|run| !run.zero).map(Run::bytes).sum();
            let table = encode_runs(&runs);
            prop_assert_eq!(decode_runs(&table[4..], runs.len(), data as usize).unwrap(), runs);
        }
    }

    proptest! {
        #[test]
        fn extents_are_read_as_written(
            extents in prop::collection::vec((0u32..9, 0u64..1 << 40, 1u64..99, any::<bool>()), 0..40),
        ) {
            let extents: Vec<Extent> = extents
                .into_iter()
                .map(|(disk, at, n, zero)| Extent { disk, offset: at * 512, bytes: n * 512, zero })
                .collect();
            let data: u64 = extents.iter().filter(|extent| !extent.zero).map(|e| e.bytes).sum();
            let table = encode_extents(&extents);
            prop_assert_eq!(decode_extents(&table[4..], extents.len(), data as usize), Ok(extents));
        }
    }

    /// What is no whole number of sectors, or wraps around, is refused before anything is written.
    #[test]
    fn extents_have_bounds() {
        let good = Extent { disk: 0, offset: 512, bytes: 1024, zero: true };
        for (offset, bytes) in [(0, 0), (1, 512), (512, 100), (u64::MAX - 511, 512)] {
            let table = encode_extents(&[good, Extent { offset, bytes, ..good }]);
            let error = decode_extents(&table[4..], 2, 0).unwrap_err().to_string();
            assert!(error.contains("extent"), "{error}");
        }
        let table = encode_extents(&[Extent { zero: false, ..good }]);
        assert!(decode_extents(&table[4..], 1, 512).is_err());
        let many = vec![good; EXTENTS_MAX];
        assert!(decode_extents(&encode_extents(&many)[4..], EXTENTS_MAX + 1, 0).is_err());
    }

    #[test]
    fn messages_are_read_as_written() {
        assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
        let join = Join { migration_id: "m".into(), token: "t".into(), index: 3 };
        assert_eq!(Join::decode(&join.encode()), Ok(join));
        assert_eq!(parse_header(header(Kind::Round, 20)), Ok((Kind::Round, 20)));
        assert_eq!(parse_header(greeting(Kind::Hello, 9, 4)), Ok((Kind::Hello, 9)));
        assert_eq!(connections(&greeting(Kind::Welcome, 3, 4)), 4);
        assert_eq!(connections(&header(Kind::Welcome, 3)), 1, "an older side knows of one");
        assert_eq!(connections(&greeting(Kind::Hello, 3, u16::MAX)), CONNECTIONS_MAX);
        let sent = Sent { pages: 9, disk_bytes: 1 << 40 };
        assert_eq!(decode_round(&encode_round(3, sent)), Ok((3, sent)));
        assert_eq!(decode_welcome(&encode_welcome(&[true, false]), 2), Ok(vec![true, false]));
        assert!(decode_welcome(&encode_welcome(&[true]), 2).is_err());
        assert_eq!(decode_reason(&encode_reason("no\x1b room")).unwrap(), "no  room");
        let long = "ä".repeat(1000);
        assert_eq!(decode_reason(&encode_reason(&long)).unwrap(), "ä".repeat(512));
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let mut bytes = hello().encode();
        bytes[0] = 2;
        let error = Hello::decode(&bytes).unwrap_err().to_string();
        assert_eq!(error, "state: protocol version is 2; accepted: 3");
    }

    #[test]
    fn secrets_are_compared_whole() {
        assert!(same_secret("abc", "abc"));
        assert!(!same_secret("abc", "abd") && !same_secret("abc", "ab") && !same_secret("", "a"));
    }
}
