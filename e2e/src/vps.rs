//! Domains as customers have them: a Debian on a disk, logged into over SSH.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{Cluster, list};
use crate::image::GuestImage;
use crate::process::{run, wait_for};
use crate::vpsctl::Vpsctl;
use crate::{Error, Result, paths};

/// The image that they are made of.
pub const IMAGE: &str = "debian13";
/// The network that gives them their addresses.
pub const NETWORK: &str = "lan";
/// Every lab host's pool.
pub const POOL: &str = "ssd";
/// Debian's own first user, whom cloud-init gives the keys.
const USER: &str = "debian";
/// Agents look at their pools when they start.
const POOL_PATIENCE: Duration = Duration::from_secs(30);
/// For all that a guest does as it boots for the first time on an emulated core.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(600);

/// Imports the image onto a node and makes the network, unless they are there.
pub fn prepare(cluster: &Cluster, node: &str, mut progress: impl FnMut(&str)) -> Result<()> {
    let vpsctl = cluster.vpsctl();
    let hosts = cluster.lab().hosts()?.len();
    wait_for("the hosts' pools", POOL_PATIENCE, || {
        let pools = vpsctl.json(&["pool", "list"])?;
        Ok((list(&pools).filter(|pool| pool["state"] == "ready").count() >= hosts).then_some(()))
    })?;
    if vpsctl.call(&["network", "show", NETWORK])?.code != 0 {
        let range = ["--first", "10.78.0.100", "--last", "10.78.0.199"];
        let mut arguments = vec!["network", "create", NETWORK, "--subnet", "10.78.0.0/24"];
        arguments.extend(range);
        vpsctl.run(&arguments)?;
    }
    if vpsctl.call(&["image", "show", IMAGE])?.code == 0 {
        return Ok(());
    }
    let file = GuestImage::ensure()?.qcow2();
    let begin = std::time::Instant::now();
    let file = file.to_string_lossy().into_owned();
    let format = ["--format", "qcow2", "--node", node];
    let mut arguments = vec!["image", "import", IMAGE, "--file", &file];
    arguments.extend(format);
    vpsctl.run(&arguments)?;
    progress(&format!("image {IMAGE} is imported: {:.0} s", begin.elapsed().as_secs_f64()));
    Ok(())
}

/// One of them.
#[derive(Debug, Clone)]
pub struct Vps {
    /// The domain's name.
    pub name: String,
    /// MiB.
    pub memory_mib: u32,
    /// GiB.
    pub disk_gib: u32,
    /// What cloud-init does at its first boot.
    pub user_data: Option<PathBuf>,
    lab: String,
}

impl Vps {
    /// Small: 512 MiB, 1 GiB of disk.
    pub fn new(cluster: &Cluster, name: &str) -> Self {
        let lab = cluster.lab().name().to_owned();
        Self { name: name.to_owned(), memory_mib: 512, disk_gib: 1, user_data: None, lab }
    }

    /// Asks for it; the operation's name.
    pub fn create(&self, vpsctl: &Vpsctl, node: Option<&str>) -> Result<String> {
        match node {
            Some(node) => self.ask_for(vpsctl, &["--node", node]),
            None => self.ask_for(vpsctl, &[]),
        }
    }

    /// As `create`, on whichever node; it is not started.
    pub fn create_stopped(&self, vpsctl: &Vpsctl) -> Result<String> {
        self.ask_for(vpsctl, &["--stopped"])
    }

    fn ask_for(&self, vpsctl: &Vpsctl, how: &[&str]) -> Result<String> {
        let public = format!("{}.pub", key(&self.lab)?.display());
        let memory = format!("{}MiB", self.memory_mib);
        let disk = format!("image={IMAGE},size={}GiB,pool={POOL}", self.disk_gib);
        let mut arguments = vec!["domain", "create", &self.name, "--memory", &memory];
        arguments.extend(["--disk", &disk, "--network", NETWORK, "--ssh-key", &public]);
        let user_data = self.user_data.as_ref().map(|path| path.to_string_lossy().into_owned());
        if let Some(file) = &user_data {
            arguments.extend(["--user-data", file]);
        }
        arguments.extend(how);
        vpsctl.start(&arguments)
    }

    /// The address that it was given.
    pub fn address(&self, vpsctl: &Vpsctl) -> Result<Ipv4Addr> {
        self.of_interface(vpsctl, |domain| domain["addresses"].get(0))
    }

    /// Its interface's address.
    pub fn mac(&self, vpsctl: &Vpsctl) -> Result<String> {
        self.of_interface(vpsctl, |domain| domain["spec"]["interfaces"].get(0)?.get("mac"))
    }

    fn of_interface<T: std::str::FromStr>(
        &self,
        vpsctl: &Vpsctl,
        find: impl FnOnce(&Value) -> Option<&Value>,
    ) -> Result<T> {
        let domain = vpsctl.json(&["domain", "show", &self.name])?;
        find(&domain)
            .and_then(Value::as_str)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| Error::other(format!("{} has no address: {domain:#}", self.name)))
    }

    /// `ssh` as its owner.
    pub fn command(&self, cluster: &Cluster, script: &str) -> Result<Command> {
        let address = self.address(&cluster.vpsctl())?;
        let mut command = cluster.lab().netns().command("ssh")?;
        command.arg("-F").arg("none").arg("-i").arg(key(&self.lab)?);
        // Its host key is made when it first boots: nobody can know it.
        for option in [
            "BatchMode=yes",
            "ConnectTimeout=20",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=4",
            "LogLevel=ERROR",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "Ciphers=aes128-gcm@openssh.com,chacha20-poly1305@openssh.com",
            "KexAlgorithms=curve25519-sha256",
        ] {
            command.arg("-o").arg(option);
        }
        command.arg(format!("{USER}@{address}")).arg("--").arg(script).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a shell command line in it; its standard output, or what went wrong.
    pub fn run(&self, cluster: &Cluster, script: &str) -> Result<String> {
        run(&mut self.command(cluster, script)?)
    }

    /// Copies a file into its owner's home.
    pub fn push(&self, cluster: &Cluster, file: &Path) -> Result<()> {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let content = fs::File::open(file).map_err(Error::io("cannot open", file))?;
        run(self.command(cluster, &format!("cat > {name}"))?.stdin(content)).map(drop)
    }

    /// Waits until its owner can log in.
    pub fn wait_ssh(&self, cluster: &Cluster) -> Result<()> {
        wait_for(&format!("SSH on {}", self.name), BOOT_PATIENCE, || {
            Ok(self.run(cluster, "true").ok())
        })
        .map(|_| ())
    }
}

/// The key of all owners in a lab; made when it is first asked for.
fn key(lab: &str) -> Result<PathBuf> {
    let path = paths::run_dir(lab).join("owner_key");
    if !path.exists() {
        let new = path.with_extension("new");
        let _ = fs::remove_file(&new);
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "owner", "-f"]).arg(&new);
        run(&mut keygen)?;
        let public = |path: &Path| PathBuf::from(format!("{}.pub", path.display()));
        fs::rename(public(&new), public(&path)).map_err(Error::io("cannot move", &new))?;
        fs::rename(&new, &path).map_err(Error::io("cannot move", &new))?;
    }
    Ok(path)
}
