//! A domain is saved, goes on, or is not saved after all.

use super::*;

#[test]
fn a_domain_is_saved_and_goes_on() {
    let mut lab = running();
    let generation = lab.domain("vm").generation_id;
    let begun = save(&mut lab);
    let made = volume(&lab, "vm-memory").unwrap();
    assert_eq!(made.size_bytes, (256 + 64) * MIB);
    let assignment = lab.assignment("a", "vm").unwrap();
    assert_eq!(assignment.memory.unwrap().volume_uid, made.uid);
    assert_eq!((assignment.disks.len(), power(&lab)), (1, PowerState::Saved));
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(outcome(&lab, &begun).0, OperationState::Running);
    says(&mut lab, S::Stopped, ExitReason::Saved);
    assert_eq!(outcome(&lab, &begun), DONE);
    assert_eq!(lab.domain("vm").state(), DomainState::Saved);
    // Again and again, and after its host has rebooted: it stays so.
    says(&mut lab, S::Stopped, ExitReason::Saved);
    lab.hello("a", "boot-2");
    report_nothing(&mut lab);
    assert_eq!(lab.domain("vm").state(), DomainState::Saved);
    assert_eq!((power(&lab), lab.domain("vm").epoch), (PowerState::Saved, 1));

    // What it is made of must not change meanwhile.
    assert_eq!(reason(reinstall(&mut lab, 0, None)), "SAVED");
    assert_eq!(reason(rescue(&mut lab)), "SAVED");
    assert_eq!(reason(resize(&mut lab, Resize { vcpus: 2, ..Resize::default() })), "SAVED");
    assert_eq!(reason(ask(&mut lab, save_domain)), "WRONG_STATE");

    let begun = start(&mut lab, false);
    assert_eq!((power(&lab), lab.domain("vm").epoch), (PowerState::Running, 2));
    assert!(lab.assignment("a", "vm").unwrap().memory.is_some());
    // The run before is over, and says nothing of this one.
    says_under(&mut lab, 1, S::Stopped, ExitReason::Saved);
    assert!(volume(&lab, "vm-memory").is_some());
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(outcome(&lab, &begun), DONE);
    assert!(volume(&lab, "vm-memory").is_none());
    assert_eq!(garbage(&lab), [made.uid]);
    let domain = lab.domain("vm");
    assert_eq!((domain.generation_id, domain.memory_volume.as_str()), (generation, ""));
    assert!(lab.assignment("a", "vm").unwrap().memory.is_none());
}

/// Its agent is silent, and may have begun: what was saved must not be lost to a cancel.
#[test]
fn a_start_of_what_was_saved_is_not_taken_back() {
    let mut lab = running();
    save(&mut lab);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Saved);
    let begun = start(&mut lab, false);
    let refused = lab.cancel(&begun.id).unwrap_err().to_string();
    assert!(refused.contains("used up"), "{refused}");
    lab.pass_time(60 * 60_000);
    lab.settle();
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    assert_eq!(power(&lab), PowerState::Running);
    assert!(lab.assignment("a", "vm").unwrap().memory.is_some());
    lab.hello("a", "boot-1");
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    assert!(volume(&lab, "vm-memory").is_none());
}

/// Memory that waits for the next start waits for one that boots.
#[test]
fn what_was_saved_goes_on_with_what_it_had() {
    let mut lab = running();
    resize(&mut lab, Resize { memory_bytes: GIB, ..Resize::default() }).unwrap();
    save(&mut lab);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Saved);
    start(&mut lab, false);
    let domain = lab.domain("vm");
    assert_eq!((domain.spec.unwrap().memory_bytes, domain.next_memory_bytes), (256 * MIB, GIB));
    // It cannot be read: it is kept until somebody says what becomes of it.
    says(&mut lab, S::Failed, ExitReason::Error);
    assert_eq!(lab.domain("vm").state(), DomainState::Failed);
    assert!(volume(&lab, "vm-memory").is_some());
    start(&mut lab, true);
    assert!(volume(&lab, "vm-memory").is_none());
    let domain = lab.domain("vm");
    assert_eq!((domain.spec.unwrap().memory_bytes, domain.next_memory_bytes), (GIB, 0));
}

#[test]
fn a_guest_that_ends_before_it_is_saved_has_ended() {
    let mut lab = running();
    let begun = save(&mut lab);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "NOT_RUNNING".into()));
    assert_eq!(
        (lab.domain("vm").state(), power(&lab)),
        (DomainState::Stopped, PowerState::Stopped)
    );
    assert!(volume(&lab, "vm-memory").is_none());

    // One whose host went down is started again, as always.
    let mut lab = running();
    let begun = save(&mut lab);
    says(&mut lab, S::Stopped, ExitReason::Killed);
    assert_eq!(outcome(&lab, &begun).0, OperationState::Failed);
    assert_eq!(
        (lab.domain("vm").state(), power(&lab)),
        (DomainState::Starting, PowerState::Running)
    );
    assert!(volume(&lab, "vm-memory").is_none());
}

/// Whoever gives up cannot know whether it was saved: nothing is removed before the owner says.
#[test]
fn a_save_that_is_given_up_loses_nothing() {
    type GiveUp = fn(&mut Lab, &OperationRecord);
    let cancel: GiveUp = |lab, begun| {
        lab.cancel(&begun.id).unwrap();
        lab.settle();
    };
    let error: GiveUp = |lab, _| {
        let mut domain = lab.observed("vm", 1, S::Running);
        domain.save_error = "no space".into();
        report(lab, domain);
    };
    let no_volume: GiveUp = |lab, _| {
        volumes(lab, VolumeState::Failed);
        says(lab, S::Running, ExitReason::Unspecified);
    };
    let deadline: GiveUp = |lab, _| {
        for _ in 0..40 {
            lab.pass_time(10_000);
            lab.beat("a");
            lab.beat("b");
            lab.settle();
        }
    };
    for (give_up, state, reason) in [
        (cancel, OperationState::Cancelled, "CANCELLED"),
        (error, OperationState::Failed, "SAVE_FAILED"),
        (no_volume, OperationState::Failed, "VOLUME_FAILED"),
        (deadline, OperationState::Failed, "DEADLINE_EXCEEDED"),
    ] {
        for was_saved in [false, true] {
            let mut lab = running();
            let begun = save(&mut lab);
            volumes(&mut lab, VolumeState::Ready);
            says(&mut lab, S::Running, ExitReason::Unspecified);
            give_up(&mut lab, &begun);
            assert_eq!(outcome(&lab, &begun), (state, reason.to_owned()));
            assert_eq!((power(&lab), lab.domain("vm").epoch), (PowerState::Running, 2));
            // Not removed, and nothing else is begun that rests on it.
            says_under(&mut lab, 1, S::Running, ExitReason::Unspecified);
            assert!(lab.assignment("a", "vm").unwrap().memory.is_some());
            assert!(lab.migrate("vm", "b").unwrap_err().to_string().contains("try again"));
            if was_saved {
                says_under(&mut lab, 1, S::Stopped, ExitReason::Saved);
                assert!(lab.assignment("a", "vm").unwrap().memory.is_some());
            }
            says(&mut lab, S::Running, ExitReason::Unspecified);
            assert!(volume(&lab, "vm-memory").is_none());
            assert_eq!(lab.domain("vm").state(), DomainState::Running);
        }
    }
}

/// The guest powered itself off just then: it stays off, and what it was saved to is of no use.
#[test]
fn a_guest_that_powers_itself_off_as_its_save_is_given_up_stays_off() {
    let mut lab = running();
    let begun = save(&mut lab);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    lab.cancel(&begun.id).unwrap();
    lab.settle();
    assert_eq!(outcome(&lab, &begun).0, OperationState::Cancelled);
    // Of the run before; the agent takes the new epoch on and starts nothing.
    says_under(&mut lab, 1, S::Stopped, ExitReason::Shutdown);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(
        (lab.domain("vm").state(), power(&lab)),
        (DomainState::Stopped, PowerState::Stopped)
    );
    assert!(volume(&lab, "vm-memory").is_none());
}

#[test]
fn a_save_needs_room() {
    let mut lab = running();
    let disks = vec![DiskResize { size_bytes: 10 * GIB, ..DiskResize::default() }];
    resize(&mut lab, Resize { disks, ..Resize::default() }).unwrap();
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    let refused = ask(&mut lab, save_domain).unwrap_err();
    assert!(refused.to_string().contains("needs 320 MiB in pool ssd, 0 MiB of"), "{refused}");
    assert_eq!(power(&lab), PowerState::Running);
}
