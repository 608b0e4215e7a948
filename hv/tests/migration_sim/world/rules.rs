//! What must hold in each moment and at the end, and the controller's part.

use super::{DE, DS, SE, SS, World};

impl World {
    pub(super) fn source_runs(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.runs)
    }

    pub(super) fn destination_runs(&self) -> bool {
        self.destination.as_ref().is_some_and(|destination| destination.runs)
    }

    /// The invariants of every moment.
    pub(super) fn check(&self) {
        assert!(!(self.source_runs() && self.destination_runs()), "I1: the guest runs twice");
        // Who may resume without the controller: the source before the line, the destination when
        // COMMIT was sent. Both at once would be a race for the guest.
        let source_may = self.source.as_ref().is_some_and(|source| {
            !matches!(
                source.machine.state(),
                SS::Releasing | SS::Committing | SS::HandedOver | SS::Succeeded
            )
        });
        let destination_may = self.commit_sent || self.moved;
        assert!(!(source_may && destination_may), "I1: both sides may resume");
        let (here, there) = (self.disk.open_here, self.disk.open_there);
        assert!(here || !self.source_runs(), "the source runs without its disks");
        assert!(there || !self.destination_runs(), "the destination runs without its disks");
        assert!(!(self.disk.shared && here && there), "two VMMs can write the volume");
    }

    /// The invariants of the end, and the controller's part.
    pub(super) fn check_end(&mut self) {
        let source = self.source.as_ref().map(|source| source.machine.state());
        let destination = self.destination.as_ref().map(|d| d.machine.state());
        let ended = [SS::Succeeded, SS::Failed, SS::HandedOver];
        assert!(source.is_none_or(|state| ended.contains(&state)), "stuck: source in {source:?}");
        let ended = [DS::Running, DS::Failed, DS::Ready];
        assert!(
            destination.is_none_or(|state| ended.contains(&state)),
            "stuck: destination in {destination:?}"
        );
        match source {
            Some(SS::Failed) => {
                assert!(self.source_runs(), "I5: the source failed in time and does not run");
                assert!(!self.disk.is_tracked(), "I5: the source's tracking is on");
                assert_ne!(destination, Some(DS::Running));
            }
            Some(SS::Succeeded) => {
                let alive = self.destination.is_some();
                assert!(!alive || self.destination_runs(), "moved, and runs nowhere");
            }
            _ => {}
        }
        self.decide(source, destination);
    }

    /// The controller: ends the one side for certain, then lets the other take over.
    fn decide(&mut self, source: Option<SS>, destination: Option<DS>) {
        // What the source has written down is there also when it was killed. Without that its disk
        // is the one that counts: the guest may have gone on and written.
        let handed_over = self.handed_over || source == Some(SS::HandedOver);
        if destination == Some(DS::Ready) && source.is_none() && !handed_over {
            self.destination = None;
            self.disk.open_there = false;
        } else if destination == Some(DS::Ready) && !matches!(source, Some(SS::Failed)) {
            self.end_source();
            self.destination_event(DE::TakeOver);
            assert!(self.step_destination(), "the locks");
            if self.destination.as_ref().is_some_and(|d| d.machine.state() == DS::Failed) {
                return;
            }
            assert!(self.step_destination(), "the guest");
            assert!(self.destination_runs());
        } else if source == Some(SS::HandedOver) && destination != Some(DS::Running) && !self.moved
        {
            // Only when the destination is gone and never ran.
            self.destination = None;
            self.disk.open_there = false;
            self.source_event(SE::TakeOver);
            assert!(self.step_source(), "the locks");
            assert!(self.step_source(), "the guest");
            assert!(self.source_runs());
        }
        assert!(!(self.source_runs() && self.destination_runs()), "I1 after the decision");
    }
}
