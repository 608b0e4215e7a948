//! A pool that all hosts of a lab share: a directory of the first one, over NFS 4.2. The first
//! host mounts it, too, so that all of them ask one server for their locks.

use std::time::Duration;

use serde_json::Value;

use crate::cluster::{Cluster, list};
use crate::process::wait_for;
use crate::{Error, Lab, Result};

/// Its id on every host.
pub const POOL: &str = "nfs";
/// Where it is mounted.
pub const MOUNT: &str = "/mnt/drover-shared";
const EXPORT: &str = "/srv/drover-shared";
/// For agents that look at their pools again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Exports the directory, mounts it everywhere, and gives it to the agents as a further pool.
pub fn start(cluster: &Cluster) -> Result<()> {
    let lab = cluster.lab();
    let hosts = lab.hosts()?;
    // Clients that are gone are forgotten after the shortest time that the server knows, and no
    // earlier server is there whose clients it would have to wait for.
    let serve = format!(
        "set -e; modprobe nfsd; \
         mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd; \
         mkdir -p /var/lib/nfs/v4recovery {EXPORT}; \
         [ -s {EXPORT}/drover-pool ] || cat /proc/sys/kernel/random/uuid > {EXPORT}/drover-pool; \
         pgrep -x rpc.mountd >/dev/null || rpc.mountd -N 2 -N 3; \
         exportfs -o rw,no_root_squash,fsid=0,no_subtree_check,insecure 10.77.0.0/24:{EXPORT}; \
         rpc.nfsd -N 3 --lease-time 10 --grace-time 10 4; echo Y > /proc/fs/nfsd/v4_end_grace"
    );
    let server = hosts.first().ok_or_else(|| Error::other("the lab has no hosts"))?;
    lab.ssh(server)?.run(&serve)?;
    each(&hosts, |host| {
        mount(lab, host)?;
        let more = format!(
            "grep -q {POOL}=shared: /etc/drover/agent.env || \
             sed -i 's#^DROVER_POOLS=.*#&;{POOL}=shared:{MOUNT}#' /etc/drover/agent.env; \
             systemctl restart drover-agent"
        );
        lab.ssh(host)?.run(&more).map(|_| ())
    })?;
    for host in &hosts {
        wait_pool(cluster, host, "ready")?;
    }
    Ok(())
}

/// Mounts it on one host.
pub fn mount(lab: &Lab, host: &str) -> Result<()> {
    let hosts = lab.hosts()?;
    let server = hosts.first().ok_or_else(|| Error::other("the lab has no hosts"))?;
    let address = lab.ssh(server)?.address;
    let mount = format!(
        "mkdir -p {MOUNT}; mountpoint -q {MOUNT} || mount -t nfs4 -o vers=4.2,hard {address}:/ \
         {MOUNT}"
    );
    lab.ssh(host)?.run(&mount).map(|_| ())
}

/// The hosts are as they were before, but for what is in the directory.
pub fn end(cluster: &Cluster) -> Result<()> {
    let lab = cluster.lab();
    each(&lab.hosts()?, |host| {
        let less = format!(
            "sed -i 's#;{POOL}=shared:{MOUNT}##' /etc/drover/agent.env; \
             systemctl restart drover-agent; mountpoint -q {MOUNT} && umount {MOUNT}; \
             rm -f /var/lib/drover/shared-pools/{POOL}"
        );
        lab.ssh(host)?.run(&less).map(|_| ())
    })
}

/// Waits until the host's agent says this of the pool; its row.
pub fn wait_pool(cluster: &Cluster, host: &str, state: &str) -> Result<Value> {
    let name = format!("nodes/{host}/pools/{POOL}");
    wait_for(&format!("{name} is {state}"), PATIENCE, || {
        // An agent that has just started is not heard yet.
        let pools = cluster.vpsctl().json(&["pool", "list"]).unwrap_or_default();
        Ok(list(&pools).find(|pool| pool["name"] == name && pool["state"] == state).cloned())
    })
}

/// On all hosts at once.
fn each(hosts: &[String], work: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = hosts.iter().map(|host| scope.spawn(|| work(host))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(Error::other("a thread panicked")))
        })
    })
}
