//! A lab: a switch, hosts, and a namespace, by name.
//!
//! What runs is written to `state.json` in the lab's run folder after each change, so that
//! another process can open the same lab; a lock there keeps two from changing it at once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::host::{self, CommonDisks, HOSTS_MAX, HostFiles, HostSpec};
use crate::image::{self, RootImage};
use crate::netns::Netns;
use crate::process::{self, Process};
use crate::snapshot::Snapshot;
use crate::ssh::Ssh;
use crate::switch::{self, LinkState, Port, Segment};
use crate::{Error, Result, paths};

/// Longest time that an emulated host takes to boot on a machine that does much else.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
const NAME_LENGTH_MAX: usize = 20;

/// What to start.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Letters, digits and '-'.
    pub name: String,
    /// 1 to 8.
    pub hosts: usize,
    /// Of each host.
    pub vcpus: usize,
    /// Of each host, in MiB.
    pub memory_mib: usize,
    /// Boot the hosts, also when the cache has them booted.
    pub boot: bool,
}

impl Default for LabOptions {
    /// One core a host: three hosts share two real ones as it is, an emulated core alone needs no
    /// atomic instructions, and a host with two has been seen to corrupt its memory (QEMU 10.0.2)
    /// while guests ran in it.
    fn default() -> Self {
        Self { name: "lab".to_owned(), hosts: 3, vcpus: 1, memory_mib: 3072, boot: false }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    switch: Process,
    common: CommonDisks,
    ssh_key: PathBuf,
    known_hosts: PathBuf,
    hosts: Vec<HostEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct HostEntry {
    spec: HostSpec,
    process: Option<Process>,
}

/// A running lab.
#[derive(Debug, Clone)]
pub struct Lab {
    name: String,
}

impl Lab {
    /// Starts a lab and waits until every host answers. One of the same name is taken down first.
    pub fn up(options: &LabOptions, mut progress: impl FnMut(&str)) -> Result<Self> {
        let lab = Self::named(&options.name)?;
        if !(1..=HOSTS_MAX).contains(&options.hosts) {
            return Err(Error::other(format!(
                "--hosts {}: 1 to {HOSTS_MAX} are accepted",
                options.hosts
            )));
        }
        let image = RootImage::ensure()?;
        let is_emulated = !host::has_hardware_virtualization();
        lab.down()?;
        let (run_dir, disk_dir) = (paths::run_dir(&lab.name), paths::disk_dir(&lab.name));
        for dir in [&run_dir, &disk_dir] {
            fs::create_dir_all(dir).map_err(Error::io("cannot create", dir))?;
        }

        progress("guest init, initramfs and payload disk");
        let initramfs = image::make_initramfs(&image, &disk_dir)?;
        let payload = image::make_payload(&image, &initramfs, &disk_dir)?;
        let common = CommonDisks { kernel: image.kernel(), initramfs, root: image.disk(), payload };

        progress("switch and namespace");
        let netns = lab.netns();
        netns.create()?;
        let switch = switch::start(&lab.name)?;
        lab.configure_namespace()?;

        let mut state = State {
            switch,
            common,
            ssh_key: image.ssh_key(),
            known_hosts: image.known_hosts(),
            hosts: Vec::new(),
        };
        lab.save(&state)?;
        let begin = std::time::Instant::now();
        let mut snapshots = Vec::new();
        for number in 1..=options.hosts {
            let spec = HostSpec { number, vcpus: options.vcpus, memory_mib: options.memory_mib };
            let snapshot = Snapshot::of(&spec, &state.common)?;
            let booted = snapshot.state().filter(|_| !options.boot && is_emulated);
            let files = HostFiles::of(&lab.name, &spec.name());
            if booted.is_some() {
                progress(&format!("{}: goes on from where it was after its boot", spec.name()));
                snapshot.restore_disks(&files)?;
            } else {
                progress(&format!("{}: boots", spec.name()));
                host::make_disks(&lab.name, &spec, &state.common)?;
            }
            let process = Some(host::start(&lab.name, &spec, &state.common, booted.as_deref())?);
            if booted.is_some() {
                Snapshot::go_on(&files)?;
            }
            snapshots.push((snapshot, files, booted.is_some()));
            state.hosts.push(HostEntry { spec, process });
            lab.save(&state)?;
        }
        for (entry, (snapshot, files, was_booted)) in state.hosts.iter().zip(snapshots) {
            let name = entry.spec.name();
            let ssh = lab.wait_answers(&name)?;
            if !was_booted && is_emulated {
                progress(&format!("{name}: has booted, and is kept so for the next time"));
                // Until all units have started; a failed one ends the wait as well.
                ssh.run("systemctl is-system-running --wait || true")?;
                ssh.disconnect();
                snapshot.save(&files)?;
                lab.wait_answers(&name)?;
            }
            lab.prepare(&ssh)?;
            progress(&format!("{name}: is up after {:.1} s", begin.elapsed().as_secs_f64()));
        }
        Ok(lab)
    }

    /// A lab that runs already.
    pub fn open(name: &str) -> Result<Self> {
        let lab = Self::named(name)?;
        lab.state()?;
        Ok(lab)
    }

    fn named(name: &str) -> Result<Self> {
        let good = !name.is_empty()
            && name.len() <= NAME_LENGTH_MAX
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !good {
            return Err(Error::other(format!(
                "--name {name:?}: 1 to {NAME_LENGTH_MAX} of a-z, 0-9 and '-' are accepted"
            )));
        }
        Ok(Self { name: name.to_owned() })
    }

    /// Takes down the lab of that name; see [`Lab::down`].
    pub fn down_by_name(name: &str) -> Result<()> {
        Self::named(name)?.down()
    }

    /// Takes it down: hosts, switch, namespace, disks. One that is not there is no error.
    pub fn down(&self) -> Result<()> {
        if let Ok(state) = self.state() {
            for entry in &state.hosts {
                self.ssh_with(&state, &entry.spec).disconnect();
                if let Some(process) = entry.process {
                    process.kill()?;
                }
            }
            state.switch.kill()?;
        }
        for process in self.processes_in_namespace()? {
            process.kill()?;
        }
        self.netns().delete()?;
        for dir in [paths::run_dir(&self.name), paths::disk_dir(&self.name)] {
            match fs::remove_dir_all(&dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("cannot remove", &dir)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Those started with [`Lab::exec`] or by tests: the namespace is the lab's own, so whatever
    /// still lives in it is the lab's too.
    fn processes_in_namespace(&self) -> Result<Vec<Process>> {
        let netns = self.netns();
        if !netns.exists() {
            return Ok(Vec::new());
        }
        let list = process::run(Command::new("ip").args(["netns", "pids", netns.name()]))?;
        Ok(list
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .filter(|pid| *pid != std::process::id())
            .filter_map(|pid| Process::of(pid).ok())
            .collect())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace of controllers and clients.
    pub fn netns(&self) -> Netns {
        Netns::named(format!("drover-{}", self.name))
    }

    fn configure_namespace(&self) -> Result<()> {
        let netns = self.netns();
        let (mgmt, guest) = (Segment::Mgmt.tap(), Segment::Guest.tap());
        for address in ["10.77.0.1/24", "10.77.0.11/24", "10.77.0.12/24", "10.77.0.13/24"] {
            netns.ip(&["addr", "add", address, "dev", mgmt])?;
        }
        netns.ip(&["addr", "add", "10.78.0.1/24", "dev", guest])?;
        // Hosts pay by the frame: large ones where no guest is.
        netns.ip(&["link", "set", mgmt, "mtu", "65500", "up"])?;
        netns.ip(&["link", "set", guest, "up"])
    }

    fn state_path(&self) -> PathBuf {
        paths::run_dir(&self.name).join("state.json")
    }

    fn state(&self) -> Result<State> {
        let path = self.state_path();
        let text = fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::other(format!("no lab {:?} is up (drover-lab up starts one)", self.name))
            }
            _ => Error::io("cannot read", &path)(e),
        })?;
        serde_json::from_slice(&text).map_err(|e| Error::other(format!("{}: {e}", path.display())))
    }

    fn save(&self, state: &State) -> Result<()> {
        let path = self.state_path();
        let text = serde_json::to_vec_pretty(state).map_err(|e| Error::other(e.to_string()))?;
        let new = path.with_extension("new");
        fs::write(&new, text).map_err(Error::io("cannot write", &new))?;
        fs::rename(&new, &path).map_err(Error::io("cannot write", &path))
    }

    /// Changes the state, alone.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let _alone = image::lock(&paths::run_dir(&self.name).join("lock"))?;
        let mut state = self.state()?;
        let result = change(&mut state);
        self.save(&state)?;
        result
    }

    /// The hosts' names.
    pub fn hosts(&self) -> Result<Vec<String>> {
        Ok(self.state()?.hosts.iter().map(|h| h.spec.name()).collect())
    }

    /// Whether a host's QEMU runs.
    pub fn is_running(&self, host: &str) -> Result<bool> {
        let state = self.state()?;
        Ok(find(&state.hosts, host)?.process.is_some_and(|p| p.is_alive()))
    }

    /// Whether the switch runs.
    pub fn switch_is_running(&self) -> Result<bool> {
        Ok(self.state()?.switch.is_alive())
    }

    /// A host's QEMU.
    pub fn host_process(&self, host: &str) -> Result<Option<Process>> {
        Ok(find(&self.state()?.hosts, host)?.process)
    }

    /// SIGKILL for a host's QEMU: the power cable is pulled.
    pub fn kill(&self, host: &str) -> Result<()> {
        self.change(|state| {
            let spec = find(&state.hosts, host)?.spec.clone();
            if let Some(process) = find_mut(&mut state.hosts, host)?.process.take() {
                process.kill()?;
            }
            self.ssh_with(state, &spec).disconnect();
            Ok(())
        })
    }

    /// Starts a host that was killed, with the disk it had, and waits until it answers.
    pub fn start(&self, host: &str) -> Result<()> {
        self.change(|state| {
            let common = state.common.clone();
            let entry = find_mut(&mut state.hosts, host)?;
            if entry.process.is_some_and(|p| p.is_alive()) {
                return Err(Error::other(format!("{host} runs already")));
            }
            let _ = fs::remove_file(HostFiles::of(&self.name, host).qmp);
            entry.process = Some(host::start(&self.name, &entry.spec, &common, None)?);
            Ok(())
        })?;
        self.wait_ready(host)
    }

    /// Waits until a host answers, and makes it ready for use.
    pub fn wait_ready(&self, host: &str) -> Result<()> {
        let ssh = self.wait_answers(host)?;
        self.prepare(&ssh)
    }

    fn wait_answers(&self, host: &str) -> Result<Ssh> {
        let ssh = self.ssh(host)?;
        match ssh.connect(BOOT_PATIENCE) {
            Ok(()) => Ok(ssh),
            Err(error) => {
                let console = self.console(host).unwrap_or_default();
                let lines: Vec<&str> = console.lines().rev().take(15).collect();
                let tail: Vec<&str> = lines.into_iter().rev().collect();
                Err(Error::other(format!(
                    "{host}: {error}; its console ends with:\n{}",
                    tail.join("\n")
                )))
            }
        }
    }

    /// What a saved host cannot know: the time, and the disk with our programs.
    fn prepare(&self, ssh: &Ssh) -> Result<()> {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64();
        ssh.run(&format!(
            "set -e; date -u -s @{now:.3} > /dev/null; \
             mountpoint -q /opt/drover && exit; \
             blockdev --flushbufs /dev/vdb; \
             mount -t ext4 -o ro,noatime /dev/vdb /opt/drover"
        ))
        .map(|_| ())
    }

    /// How to run commands on a host.
    pub fn ssh(&self, host: &str) -> Result<Ssh> {
        let state = self.state()?;
        let spec = &find(&state.hosts, host)?.spec;
        Ok(self.ssh_with(&state, spec))
    }

    fn ssh_with(&self, state: &State, spec: &HostSpec) -> Ssh {
        Ssh {
            netns: self.netns(),
            address: spec.address(),
            key: state.ssh_key.clone(),
            known_hosts: state.known_hosts.clone(),
            control: HostFiles::of(&self.name, &spec.name()).ssh_control,
        }
    }

    /// What a host has said on its serial console.
    pub fn console(&self, host: &str) -> Result<String> {
        let path = HostFiles::of(&self.name, host).console;
        let bytes = fs::read(&path).map_err(Error::io("cannot read", &path))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Copies the logs of switch, hosts, controllers and agents to a folder.
    pub fn save_logs(&self, folder: &std::path::Path) -> Result<()> {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder).map_err(Error::io("cannot create", folder))?;
        let run_dir = paths::run_dir(&self.name);
        let entries = fs::read_dir(&run_dir).map_err(Error::io("cannot list", &run_dir))?;
        for path in entries.flatten().map(|e| e.path()) {
            let is_log = path.extension().is_some_and(|e| e == "log" || e == "console");
            if let (true, Some(name)) = (is_log, path.file_name()) {
                fs::copy(&path, folder.join(name)).map_err(Error::io("cannot copy", &path))?;
            }
        }
        for host in self.hosts()? {
            let path = folder.join(format!("{host}.journal"));
            // A host that is down or cut off has no journal to give.
            if let Ok(journal) = self.ssh(&host)?.run("journalctl --no-pager -o short-monotonic") {
                fs::write(&path, journal).map_err(Error::io("cannot write", &path))?;
            }
        }
        Ok(())
    }

    /// Pulls (or plugs in again) one or both of a host's cables.
    pub fn set_cut(&self, host: &str, segments: &[Segment], cut: bool) -> Result<()> {
        self.set_link(host, segments, |link| link.cut = cut)
    }

    /// Changes what a host's cables do to frames.
    pub fn set_link(
        &self,
        host: &str,
        segments: &[Segment],
        change: impl Fn(&mut LinkState),
    ) -> Result<()> {
        let number = find(&self.state()?.hosts, host)?.spec.number;
        let control = switch::Control::connect(&paths::run_dir(&self.name))?;
        for segment in segments {
            control.change(Port::Host(number, *segment), &change)?;
        }
        Ok(())
    }

    /// The hosts from which frames of this address came on the guests' network, in order, without
    /// announcements. One that comes back to a host without having been moved there runs twice.
    pub fn hosts_of_address(&self, mac: &str) -> Result<Vec<String>> {
        let moves = switch::Control::connect(&paths::run_dir(&self.name))?.moves()?;
        Ok(moves
            .into_iter()
            .filter(|m| m.mac.eq_ignore_ascii_case(mac))
            .filter_map(|m| match m.port {
                Port::Host(number, Segment::Guest) => Some(format!("host{number}")),
                _ => None,
            })
            .collect())
    }

    /// What all cables do, and what went over them.
    pub fn links(&self) -> Result<Vec<switch::PortReport>> {
        switch::Control::connect(&paths::run_dir(&self.name))?.report()
    }
}

fn find<'a>(hosts: &'a [HostEntry], name: &str) -> Result<&'a HostEntry> {
    hosts.iter().find(|h| h.spec.name() == name).ok_or_else(|| no_host(hosts, name))
}

fn find_mut<'a>(hosts: &'a mut [HostEntry], name: &str) -> Result<&'a mut HostEntry> {
    let known = no_host(hosts, name);
    hosts.iter_mut().find(|h| h.spec.name() == name).ok_or(known)
}

fn no_host(hosts: &[HostEntry], name: &str) -> Error {
    let names: Vec<String> = hosts.iter().map(|h| h.spec.name()).collect();
    Error::other(format!("no host {name:?} in this lab; there are {}", names.join(", ")))
}
