//! What must hold, all the time and at the end.

use drover_controller::store::{Engine as _, Family};

use super::{KEYS, LIMITS, World};
use crate::sim::linearizable::{self, Action, Operation};

impl World {
    pub(super) fn check_applied(
        &mut self,
        id: u64,
        index: u64,
        found: (u64, u64),
    ) -> Result<(), String> {
        self.summary.applied += 1;
        let known = *self.applied.entry(index).or_insert(found);
        if known != found {
            return Err(format!(
                "member {id} applied index {index} as (term, hash) {found:x?}, another {known:x?}"
            ));
        }
        Ok(())
    }

    pub(super) fn check_leader(&mut self, id: u64, term: u64) -> Result<(), String> {
        let known = *self.leaders.entry(term).or_insert_with(|| {
            self.summary.leaders += 1;
            id
        });
        if known != id {
            return Err(format!("members {known} and {id} lead term {term}"));
        }
        self.trace(|| format!("member {id} leads term {term}"));
        Ok(())
    }

    /// All members have applied the same, and their change histories have no gap.
    pub(super) fn check_equal(&self) -> Result<(), String> {
        let mut found = Vec::new();
        for (id, member) in &self.members {
            let core = member.core.as_ref().ok_or_else(|| format!("member {id} is down"))?;
            found.push((core.applied().0, core.state().revision(), core.state().content_hash()));
            let (first, last) = core.log_range();
            if last + 1 - first > LIMITS.log_entries_max + 5 {
                return Err(format!("member {id} keeps the log from {first} to {last}"));
            }
            self.check_changes(*id, core.state().revision())?;
        }
        found.dedup();
        if found.len() != 1 {
            return Err(format!("members differ (index, revision, hash): {found:x?}"));
        }
        Ok(())
    }

    fn check_changes(&self, id: u64, revision: u64) -> Result<(), String> {
        let rows = self.members[&id]
            .disk
            .scan(Family::Events, &[], usize::MAX)
            .map_err(|e| e.to_string())?;
        let revisions: Vec<_> =
            rows.iter().map(|(key, _)| u64::from_be_bytes(key[..].try_into().unwrap())).collect();
        let expected: Vec<_> = (revision + 1 - revisions.len() as u64..=revision).collect();
        if revisions != expected {
            return Err(format!("member {id} at {revision} keeps changes {revisions:?}"));
        }
        let most = LIMITS.history_revisions + LIMITS.history_stride;
        if revisions.len() as u64 > most {
            return Err(format!("member {id} keeps {} revisions", revisions.len()));
        }
        Ok(())
    }

    pub(super) fn check_history(&self) -> Result<(), String> {
        for key in 0..KEYS {
            let operations: Vec<_> = self
                .history
                .iter()
                .filter(|live| live.key == key && !live.never)
                .filter(|live| live.end.is_some() || !matches!(live.action, Action::Read(_)))
                .map(|live| Operation { start: live.start, end: live.end, action: live.action })
                .collect();
            if !linearizable::check(&operations) {
                return Err(format!("key {key} is not linearizable: {operations:#?}"));
            }
        }
        Ok(())
    }
}
