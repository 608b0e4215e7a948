# Shared by the scripts here: messages, and what this machine's apt is configured with.
# Nothing names a host: mirrors, proxies and keys are those the machine already uses.

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

DEBIAN_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# The URI from which this machine gets its own Debian release ("main" of the plain suite).
debian_mirror() {
    local codename uri
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    uri=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)' \
            'Created-By: Packages' |
        awk -F'|' -v c="$codename" '$1=="Debian" && $2=="Debian" && $3==c && $4=="main" {print $5; exit}')
    [ -n "$uri" ] || die "apt has no configured source for Debian $codename main (see /etc/apt/sources.list*; run apt-get update)"
    printf '%s\n' "${uri%/}"
}

# apt's proxies and validity checks, one `key "value";` a line, for an apt with another root.
apt_network_options() {
    apt-config dump | grep -E '^Acquire::(https?::[^ ]*|Check-Valid-Until|Check-Date|Retries|ForceIPv[46]) "[^"]+";$' || true
}
