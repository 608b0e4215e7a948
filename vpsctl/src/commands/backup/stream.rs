//! The messages of `ReadSnapshot`: what is known goes, blocks come, and nothing is computed with
//! that was not looked at.

use std::sync::Arc;

use drover_proto::v1::{
    KnownBlocks, ReadSnapshotRequest, ReadSnapshotResponse, ReadSnapshotSpec,
    read_snapshot_request::Message,
};
use futures::{Stream, stream};

use crate::{
    backup::{BLOCK_BYTES, Digest},
    error::Error,
};

/// Half of what the API takes in one message.
const KNOWN_MAX: usize = 16_384;
/// The disk of a snapshot that claims more is not believed.
const DISK_BYTES_MAX: u64 = 64 << 40;

/// The spec, then what is known.
pub(super) fn messages(
    snapshot: &str,
    place: usize,
    known: Arc<Vec<Option<Digest>>>,
) -> impl Stream<Item = ReadSnapshotRequest> + Send + 'static {
    let message = |message| ReadSnapshotRequest { message: Some(message) };
    let disk = u32::try_from(place).unwrap_or(u32::MAX);
    let spec = Message::Spec(ReadSnapshotSpec { name: snapshot.to_owned(), disk });
    let parts = (0..known.len()).step_by(KNOWN_MAX).filter_map(move |first| {
        let part = &known[first..known.len().min(first + KNOWN_MAX)];
        // Zeros stand for none.
        let bytes = |digest: &Option<Digest>| digest.map_or([0; 32], |digest| digest.0);
        part.iter().any(Option::is_some).then(|| {
            let digests: Vec<u8> = part.iter().flat_map(bytes).collect();
            Message::Known(KnownBlocks { first_block: first as u64, digests: digests.into() })
        })
    });
    stream::iter(std::iter::once(spec).chain(parts).map(message))
}

/// A block as it came.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) index: usize,
    pub(super) digest: Digest,
    /// Empty when it is known.
    pub(super) data: prost::bytes::Bytes,
}

impl Block {
    /// With the zeros behind the disk's end, and compared with its digest.
    pub(super) fn whole(&self, place: usize) -> Result<Vec<u8>, Error> {
        let mut data = self.data.to_vec();
        data.resize(BLOCK_BYTES, 0);
        if Digest::of(&data) == self.digest {
            return Ok(data);
        }
        let text = format!("disk {place}: block {} is not what its digest says", self.index);
        Err(Error::Local(text))
    }
}

/// What one message means.
#[derive(Debug)]
pub(super) enum Said {
    /// The first one: how large the disk is.
    Size,
    /// Nothing but zeros up to here.
    Zeros {
        until: u64,
    },
    Block(Block),
}

/// Checks a stream's messages: nothing is computed with that was not looked at.
pub(super) struct Reader<'a> {
    pub(super) place: usize,
    pub(super) said: &'a [Option<Digest>],
    pub(super) size_bytes: Option<u64>,
    /// The first block that may come.
    pub(super) next: u64,
}

impl Reader<'_> {
    pub(super) fn block_total(&self) -> usize {
        usize::try_from(self.size_bytes.unwrap_or(0).div_ceil(BLOCK_BYTES as u64)).unwrap_or(0)
    }

    pub(super) fn take(&mut self, answer: ReadSnapshotResponse) -> Result<Said, String> {
        const STEP: u64 = BLOCK_BYTES as u64;
        let place = self.place;
        let Some(size_bytes) = self.size_bytes else {
            if answer.size_bytes == 0 || answer.size_bytes > DISK_BYTES_MAX {
                return Err(format!("disk {place}: a size of {} bytes", answer.size_bytes));
            }
            self.size_bytes = Some(answer.size_bytes);
            return Ok(Said::Size);
        };
        let offset = answer.offset;
        let index = offset / STEP;
        if answer.digest.is_empty() && answer.data.is_empty() {
            if offset > size_bytes || offset < self.next.saturating_mul(STEP).min(size_bytes) {
                return Err(format!("disk {place}: zeros up to {offset}, out of order"));
            }
            self.next = offset.div_ceil(STEP);
            return Ok(Said::Zeros { until: offset });
        }
        if !offset.is_multiple_of(STEP) || offset >= size_bytes || index < self.next {
            return Err(format!(
                "disk {place}: a block at {offset}, out of order or no place of one"
            ));
        }
        self.next = index + 1;
        let index = usize::try_from(index).map_err(|e| e.to_string())?;
        let digest: [u8; 32] = answer.digest[..]
            .try_into()
            .map_err(|_| format!("disk {place}: block {index} has no SHA-256"))?;
        let digest = Digest(digest);
        let length = (size_bytes - offset).min(STEP) as usize;
        let known = self.said.get(index).copied().flatten() == Some(digest);
        match answer.data.len() {
            0 if known => {}
            n if n == length => {}
            n => return Err(format!("disk {place}: block {index} has {n} bytes of {length}")),
        }
        Ok(Said::Block(Block { index, digest, data: answer.data }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;

    fn answer(offset: u64, digest: Digest, data: &[u8]) -> ReadSnapshotResponse {
        let digest = digest.0.to_vec().into();
        ReadSnapshotResponse { size_bytes: 0, offset, digest, data: data.to_vec().into() }
    }

    /// A stream from a node that has gone wrong is refused, not computed with.
    #[test]
    fn a_stream_is_checked() {
        const MIB: u64 = 1 << 20;
        let known = Digest([1; 32]);
        let said = [Some(known), None];
        let reader = || {
            let mut reader = Reader { place: 0, said: &said, size_bytes: None, next: 0 };
            let first = ReadSnapshotResponse { size_bytes: MIB + 512, ..Default::default() };
            assert!(matches!(reader.take(first).unwrap(), Said::Size));
            assert_eq!(reader.block_total(), 2);
            reader
        };
        let block = |said: Said| match said {
            Said::Block(block) => block,
            other => panic!("{other:?}"),
        };
        assert!(block(reader().take(answer(0, known, &[])).unwrap()).data.is_empty());
        let mut tail = vec![5; 512];
        let padded = [&tail[..], &vec![0; BLOCK_BYTES - 512]].concat();
        let mut reader_at_end = reader();
        let last = block(reader_at_end.take(answer(MIB, Digest::of(&padded), &tail)).unwrap());
        assert!(last.whole(0).unwrap() == padded);
        assert!(reader_at_end.take(answer(0, known, &[])).is_err(), "out of order");
        tail[0] = 6;
        let other = Block { data: tail.clone().into(), ..last };
        assert!(other.whole(0).unwrap_err().to_string().contains("block 1 is not what its digest"));
        for (offset, digest, data) in [
            (512, known, &[][..]),
            (2 * MIB, known, &[]),
            (u64::MAX, known, &[]),
            (MIB, known, &[]),
            (0, Digest([2; 32]), &[]),
            (MIB, known, &tail[1..]),
        ] {
            assert!(reader().take(answer(offset, digest, data)).is_err(), "{offset}");
        }
        let zeros = |offset| ReadSnapshotResponse { offset, ..Default::default() };
        let mut waiting = reader();
        for until in [MIB, MIB, MIB + 512] {
            let said = waiting.take(zeros(until)).unwrap();
            assert!(matches!(said, Said::Zeros { until: at } if at == until), "{said:?}");
        }
        assert!(waiting.take(zeros(MIB)).is_err(), "it goes back");
        assert!(waiting.take(answer(MIB, Digest::of(&padded), &tail)).is_err(), "not zeros then");
        assert!(reader().take(zeros(MIB + 513)).is_err(), "beyond the end");
        let odd = ReadSnapshotResponse { digest: vec![1; 31].into(), ..Default::default() };
        assert!(reader().take(odd).unwrap_err().contains("no SHA-256"));
        for size_bytes in [0, u64::MAX] {
            let mut reader = Reader { place: 0, said: &[], size_bytes: None, next: 0 };
            assert!(
                reader.take(ReadSnapshotResponse { size_bytes, ..Default::default() }).is_err()
            );
        }
    }

    /// What is known is said in messages that the API takes; where nothing is, nothing.
    #[tokio::test]
    async fn what_is_known_is_said_in_parts() {
        let mut known = vec![None; 3 * KNOWN_MAX + 1];
        known[5] = Some(Digest([5; 32]));
        known[3 * KNOWN_MAX] = Some(Digest([9; 32]));
        let sent: Vec<_> = messages("snapshots/a", 1, Arc::new(known)).collect().await;
        let mut sent = sent.into_iter().map(|request| request.message.unwrap());
        let spec = ReadSnapshotSpec { name: "snapshots/a".to_owned(), disk: 1 };
        assert_eq!(sent.next(), Some(Message::Spec(spec)));
        let Some(Message::Known(first)) = sent.next() else { panic!("nothing known") };
        assert_eq!((first.first_block, first.digests.len()), (0, 32 * KNOWN_MAX));
        assert!(first.digests[5 * 32..6 * 32] == [5; 32] && first.digests[..5 * 32] == [0; 160]);
        let last = KnownBlocks { first_block: 3 * KNOWN_MAX as u64, digests: vec![9; 32].into() };
        assert_eq!(sent.next(), Some(Message::Known(last)));
        assert_eq!(sent.next(), None);
    }
}
