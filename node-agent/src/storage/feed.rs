//! From a stream that comes in on the runtime to a thread that reads and may block. The end of
//! the stream is a piece of its own: one that breaks off is an error, and never a short file.

use std::io::{self, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::Progress;

/// Pieces on their way: then the stream waits for the disk.
const PIECES_MAX: usize = 4;

/// The runtime's side.
#[derive(Debug)]
pub(super) struct Feeder {
    pieces: mpsc::Sender<Piece>,
}

/// The thread's side.
#[derive(Debug)]
pub(super) struct Feed {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
    progress: Arc<Progress>,
    read: u64,
}

#[derive(Debug)]
enum Piece {
    Data(Bytes),
    End,
}

/// The reader has gone; it says itself why.
#[derive(Debug)]
pub(super) struct Gone;

/// Both sides; what is read is counted.
pub(super) fn feed(progress: Arc<Progress>) -> (Feeder, Feed) {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let feed = Feed { pieces, piece: Bytes::new(), ended: false, progress, read: 0 };
    (Feeder { pieces: sender }, feed)
}

impl Feeder {
    pub(super) async fn data(&self, bytes: Bytes) -> Result<(), Gone> {
        self.pieces.send(Piece::Data(bytes)).await.map_err(|_| Gone)
    }

    /// The stream has come to its end.
    pub(super) async fn end(self) -> Result<(), Gone> {
        self.pieces.send(Piece::End).await.map_err(|_| Gone)
    }
}

impl Read for Feed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(piece)) => self.piece = piece,
                Some(Piece::End) => self.ended = true,
                None => {
                    let reason = "the stream broke off";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
                }
            }
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        self.read += count as u64;
        self.progress.set(self.read, self.progress.total());
        Ok(count)
    }
}
