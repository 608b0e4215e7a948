//! `--pool ID=lvm:VG/THIN`, `ID=dir:/path` or `ID=shared:/path`, with `,overcommit=2.0` behind it or without.

use std::str::FromStr;

use drover_storage::PoolSpec;

/// Nobody promises a hundred times what there is.
const OVERCOMMIT_MAX: f64 = 100.0;
const OVERCOMMIT_DEFAULT: f64 = 1.0;
const OVERCOMMIT: &str = ",overcommit=";

/// A pool, as its flag gives it.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolFlag {
    /// The same id on two nodes means: one may stand for the other.
    pub id: String,
    /// Where it is.
    pub spec: PoolSpec,
    /// So many times its size may be promised.
    pub overcommit: f64,
}

impl FromStr for PoolFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, rest) = text
            .split_once('=')
            .ok_or("give ID=lvm:VG/THINPOOL, ID=dir:/path or ID=shared:/path")?;
        let id = crate::cli::parse_id(id).map_err(|accepted| format!("id {id:?}: {accepted}"))?;
        let (place, overcommit) = match rest.rsplit_once(OVERCOMMIT) {
            Some((place, factor)) => (place, parse_overcommit(factor)?),
            None => (rest, OVERCOMMIT_DEFAULT),
        };
        let spec = place.parse::<PoolSpec>().map_err(|err| err.to_string())?;
        Ok(Self { id, spec, overcommit })
    }
}

fn parse_overcommit(factor: &str) -> Result<f64, String> {
    let right = |factor: &f64| (1.0..=OVERCOMMIT_MAX).contains(factor);
    factor.parse().ok().filter(right).ok_or_else(|| {
        format!("overcommit {factor:?}: give a factor from 1 to {OVERCOMMIT_MAX}, such as 2.0")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_names_id_place_and_overcommit() {
        let read = |text: &str| text.parse::<PoolFlag>().unwrap();
        let main = read("main=lvm:vg0/thin,overcommit=2.5");
        assert_eq!((main.id.as_str(), main.overcommit), ("main", 2.5));
        assert_eq!(main.spec.to_string(), "lvm:vg0/thin");
        let files = read("files=dir:/srv/a,b=c");
        assert_eq!((files.spec.to_string().as_str(), files.overcommit), ("dir:/srv/a,b=c", 1.0));
    }

    #[test]
    fn a_wrong_one_says_what_is_accepted() {
        for (text, words) in [
            ("", "ID=lvm:"),
            ("lvm:vg0/thin", "ID=lvm:"),
            ("a/b=dir:/srv", "a-z"),
            ("=dir:/srv", "a-z"),
            ("main=zfs:tank", "lvm:VG/THINPOOL"),
            ("main=dir:srv", "absolute"),
            ("main=dir:/srv,overcommit=", "factor"),
            ("main=dir:/srv,overcommit=0.5", "factor"),
            ("main=dir:/srv,overcommit=NaN", "factor"),
            ("main=dir:/srv,overcommit=1e9", "factor"),
        ] {
            let error = text.parse::<PoolFlag>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
