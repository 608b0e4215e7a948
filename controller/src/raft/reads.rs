//! Linearizable reads: many waiting, one question to the leader at a time.
//!
//! A read is safe once this member has applied the index that a leader, confirmed by a
//! majority after the read arrived, had committed. Raft drops the question without a word
//! when there is no leader, when the leader is too new, or when a message is lost; so each
//! question has a time limit in ticks, and is asked again under a new name. Asking again is
//! always right: a later answer covers an earlier read.

use std::collections::BTreeMap;

use super::Waiter;

/// Ticks after which a question is taken for lost.
const QUESTION_TICKS: u32 = 5;

/// Reads on their way.
pub(crate) struct Reads<R> {
    /// Makes names unique across members and restarts.
    prefix: [u8; 16],
    asked: u64,
    waiting: Vec<R>,
    question: Option<Question<R>>,
    /// Answered with an index that is not applied here yet.
    answered: BTreeMap<u64, Vec<R>>,
    limit: usize,
}

struct Question<R> {
    name: Vec<u8>,
    readers: Vec<R>,
    ticks: u32,
}

impl<R: Waiter> Reads<R> {
    pub(crate) fn new(member: u64, nonce: u64, limit: usize) -> Self {
        let mut prefix = [0; 16];
        prefix[..8].copy_from_slice(&member.to_be_bytes());
        prefix[8..].copy_from_slice(&nonce.to_be_bytes());
        let (waiting, answered) = (Vec::new(), BTreeMap::new());
        Self { prefix, asked: 0, waiting, question: None, answered, limit }
    }

    /// Takes a read in; gives it back when too many wait.
    pub(crate) fn push(&mut self, reader: R) -> Result<(), R> {
        if self.waiting.len() >= self.limit {
            return Err(reader);
        }
        self.waiting.push(reader);
        Ok(())
    }

    /// The name of a question to ask now, when there is one.
    pub(crate) fn next_question(&mut self) -> Option<Vec<u8>> {
        if self.question.is_some() || self.waiting.is_empty() {
            return None;
        }
        self.asked += 1;
        let mut name = self.prefix.to_vec();
        name.extend_from_slice(&self.asked.to_be_bytes());
        let readers = std::mem::take(&mut self.waiting);
        self.question = Some(Question { name: name.clone(), readers, ticks: 0 });
        Some(name)
    }

    /// The leader had committed `index`.
    pub(crate) fn answer(&mut self, name: &[u8], index: u64) {
        // An answer to a question given up is of no use: its readers wait for another one.
        if let Some(question) = self.question.take_if(|question| question.name == name) {
            self.answered.entry(index).or_default().extend(question.readers);
        }
    }

    /// Those that may read now.
    pub(crate) fn take_ready(&mut self, applied: u64) -> Vec<R> {
        let later = self.answered.split_off(&(applied + 1));
        let ready = std::mem::replace(&mut self.answered, later);
        ready.into_values().flatten().collect()
    }

    /// Gives the open question up, so that it is asked again.
    pub(crate) fn ask_again(&mut self) {
        if let Some(question) = self.question.take() {
            self.waiting.extend(question.readers);
        }
    }

    pub(crate) fn tick(&mut self) {
        if let Some(question) = &mut self.question {
            question.ticks += 1;
            if question.ticks >= QUESTION_TICKS {
                self.ask_again();
            }
        }
        self.waiting.retain(|reader| !reader.is_abandoned());
    }
}
