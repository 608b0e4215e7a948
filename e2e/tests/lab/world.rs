//! What every test is given: a lab with a cluster, and words to ask of it.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_e2e::client::{Seen, Watch};
use drover_e2e::cluster::{CONTROLLERS, DomainView, list};
use drover_e2e::guests::Guest;
use drover_e2e::lab::LabOptions;
use drover_e2e::process::wait_for;
use drover_e2e::vpsctl::{Answer, Vpsctl};
use drover_e2e::{Cluster, Error, Lab, Result};
use serde_json::Value;

/// For whatever a working cluster does within seconds, with room for an emulated machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// The last parts of the addresses that tests give to domains.
const ADDRESSES: std::ops::RangeInclusive<u8> = 11..=29;
/// Longest time without an answer that a customer may see.
pub(crate) const GAP_MAX: Duration = Duration::from_secs(2);

/// Fails the test with these words unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($word:tt)+) => {
        let holds: bool = $condition;
        if !holds {
            return Err(drover_e2e::Error::other(format!($($word)+)));
        }
    };
}

pub(crate) struct World {
    pub(crate) cluster: Cluster,
    /// How often each address had moved before this test: tests use the same addresses again.
    moves_before: BTreeMap<String, usize>,
}

impl World {
    pub(crate) fn start() -> Result<Self> {
        let options = LabOptions { name: "test".to_owned(), ..LabOptions::default() };
        let lab = Lab::up(&options, |line| println!("  {line}"))?;
        match Cluster::start(&lab, 4, |line| println!("  {line}")) {
            Ok(cluster) => Ok(Self { cluster, moves_before: BTreeMap::new() }),
            Err(error) => {
                lab.down()?;
                Err(error)
            }
        }
    }

    pub(crate) fn end(self) -> Result<()> {
        self.lab().down()
    }

    pub(crate) fn lab(&self) -> &Lab {
        self.cluster.lab()
    }

    pub(crate) fn vpsctl(&self) -> Vpsctl {
        self.cluster.vpsctl()
    }

    /// Creates a domain on a host, starts a client for it, and waits until it answers both.
    pub(crate) fn domain_with_client(&self, guest: &Guest, host: &str) -> Result<Watch> {
        let operation = guest.create(&self.vpsctl(), Some(host))?;
        self.succeeds(&operation)?;
        let watch = Watch::start(&self.lab().netns(), &[(guest.name.clone(), guest.address())])?;
        watch.wait_all_answer(PATIENCE)?;
        watch.forget();
        Ok(watch)
    }

    /// Waits for the end of an operation, whatever it is.
    pub(crate) fn ends(&self, operation: &str) -> Result<Value> {
        self.cluster.wait_operation(operation, PATIENCE)
    }

    pub(crate) fn succeeds(&self, operation: &str) -> Result<Value> {
        let value = self.ends(operation)?;
        ensure!(value["state"] == "succeeded", "{operation} should succeed: {value:#}");
        Ok(value)
    }

    pub(crate) fn fails(&self, operation: &str) -> Result<Value> {
        let value = self.ends(operation)?;
        ensure!(value["state"] == "failed", "{operation} should fail: {value:#}");
        Ok(value)
    }

    /// Waits until the domain is as wanted.
    pub(crate) fn wait_domain(
        &self,
        name: &str,
        what: &str,
        good: impl Fn(&DomainView) -> bool,
    ) -> Result<DomainView> {
        let mut last = None;
        wait_for(&format!("{name}: {what}"), PATIENCE, || {
            last = self.cluster.domain(name).ok();
            Ok(last.clone().filter(|d| good(d)))
        })
        .map_err(|e| Error::other(format!("{e}; it is {last:?}")))
    }

    /// Waits until an operation shows this.
    pub(crate) fn wait_shown<T>(
        &self,
        operation: &str,
        what: &str,
        look: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        let vpsctl = self.vpsctl();
        wait_for(&format!("{operation}: {what}"), PATIENCE, || {
            let value = vpsctl.json(&["operation", "show", operation])?;
            let state = value["state"].as_str().unwrap_or_default();
            match look(&value) {
                Some(seen) => Ok(Some(seen)),
                None if matches!(state, "pending" | "running") => Ok(None),
                None => Err(Error::other(format!("{operation} ended before {what}: {value:#}"))),
            }
        })
    }

    /// What was seen of the only domain watched must be spotless.
    pub(crate) fn unnoticed(&self, watch: Watch) -> Result<Seen> {
        // A last page tells that all is well now, too.
        watch.wait_all_answer(PATIENCE)?;
        let seen = watch.stop()?;
        let faults: Vec<String> = seen.iter().flat_map(|s| s.faults(GAP_MAX)).collect();
        ensure!(faults.is_empty(), "a customer would have noticed: {}", faults.join("; "));
        seen.into_iter().next().ok_or_else(|| Error::other("nothing was watched"))
    }

    /// The domain's frames came from these hosts, in this order, and its memory is intact.
    pub(crate) fn ran_only_on(&self, guest: &Guest, hosts: &[&str]) -> Result<()> {
        // Its answer is a frame too: without one, a guest that has just moved may have sent none.
        self.lab().netns().run(|| guest.check_memory())?;
        let all = self.lab().hosts_of_address(&guest.mac())?;
        let before = self.moves_before.get(&guest.mac()).copied().unwrap_or_default();
        // Where the test before left it is no move when this one begins there.
        let stayed =
            before > 0 && all.get(before - 1).map(String::as_str) == hosts.first().copied();
        let seen = &all[if stayed { before - 1 } else { before }..];
        ensure!(seen == hosts, "{}: frames came from {seen:?}, expected {hosts:?}", guest.name);
        Ok(())
    }

    /// vpsctl must refuse with this exit code and these words, and say it in one error.
    pub(crate) fn refuses(&self, arguments: &[&str], code: i32, words: &[&str]) -> Result<Answer> {
        let answer = self.vpsctl().call(arguments)?;
        let line = arguments.join(" ");
        ensure!(
            answer.code == code,
            "vpsctl {line}: exit code {} instead of {code}: {}{}",
            answer.code,
            answer.out,
            answer.err
        );
        for word in words {
            ensure!(answer.err.contains(word), "vpsctl {line}: no {word:?} in {:?}", answer.err);
        }
        let errors = answer.err.lines().filter(|l| l.starts_with("error")).count();
        ensure!(errors == 1, "vpsctl {line}: {errors} errors instead of one: {:?}", answer.err);
        Ok(answer)
    }

    /// The volumes on a host, by LVM's own word.
    pub(crate) fn volumes_on(&self, host: &str) -> Result<Vec<String>> {
        self.volumes_in(host, "drover")
    }

    /// As [`volumes_on`](Self::volumes_on), of another volume group.
    pub(crate) fn volumes_in(&self, host: &str, group: &str) -> Result<Vec<String>> {
        let list = format!(
            "lvs --noheadings -o lv_name {group} | tr -d ' ' | \
             grep -vE '^(drover_image_.*|thin)$' || true"
        );
        let list = self.lab().ssh(host)?.run(&list)?;
        Ok(list.split_whitespace().map(str::to_owned).collect())
    }

    /// Power is back: the host boots, its agent starts, its node is ready.
    pub(crate) fn revive(&self, host: &str) -> Result<()> {
        self.lab().start(host)?;
        self.cluster.wait_agent(host, None)?;
        self.cluster.wait_nodes_ready(self.lab().hosts()?.len(), PATIENCE)
    }

    /// After each test: no domain is left, all nodes take domains, all members run.
    pub(crate) fn tidy(&mut self) -> Result<()> {
        let vpsctl = self.vpsctl();
        for domain in self.cluster.domains()? {
            let operation = vpsctl.start(&["domain", "delete", &domain.name, "--force"])?;
            self.succeeds(&operation)?;
        }
        for host in self.lab().hosts()? {
            vpsctl.run(&["node", "uncordon", &host])?;
            let left = wait_for(&format!("{host} without VMMs"), PATIENCE, || {
                Ok(self.cluster.vmm_pids(&host)?.is_empty().then_some(()))
            });
            left.map_err(|e| Error::other(format!("{e}; {:?}", self.cluster.vmm_pids(&host))))?;
            self.leaks_nothing(&host)?;
        }
        let active = vpsctl.json(&["operation", "list", "--active"])?;
        let stuck: Vec<&Value> = list(&active).collect();
        ensure!(stuck.is_empty(), "operations are left: {stuck:?}");
        for number in ADDRESSES {
            let mac = Guest::new("any", number).mac();
            let moves = self.lab().hosts_of_address(&mac)?.len();
            self.moves_before.insert(mac, moves);
        }
        Ok(())
    }

    /// Without domains there are no volumes, seeds, loop devices or taps.
    fn leaks_nothing(&self, host: &str) -> Result<()> {
        let mut left = Vec::new();
        wait_for(&format!("{host} without leaks"), PATIENCE, || {
            left = self.volumes_on(host)?;
            let rest = "losetup -nO NAME; ip -o link | grep -oE ' dv[^:@]*' || true; \
                        ls -d /var/lib/drover/domains/* 2>/dev/null || true";
            let rest = self.lab().ssh(host)?.run(rest)?;
            left.extend(rest.split_whitespace().map(str::to_owned));
            Ok(left.is_empty().then_some(()))
        })
        .map_err(|e| Error::other(format!("{e}: {left:?}")))
    }

    /// After a failed test: everything that may be missing is started again.
    pub(crate) fn repair(&mut self) -> Result<()> {
        for id in CONTROLLERS {
            if !self.cluster.controller_runs(id)? {
                self.cluster.start_controller(id)?;
            }
        }
        for host in self.lab().hosts()? {
            self.lab().set_link(&host, &drover_e2e::switch::Segment::ALL, |link| {
                *link = drover_e2e::switch::LinkState::default();
            })?;
            if !self.lab().is_running(&host)? {
                self.lab().start(&host)?;
            }
            self.cluster.wait_agent(&host, None)?;
        }
        self.cluster.wait_nodes_ready(self.lab().hosts()?.len(), PATIENCE)?;
        self.tidy()
    }
}
