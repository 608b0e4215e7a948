//! Reports as LVM 2.03.31 (Debian 13) gave them, and what they are read as. The pool itself is
//! tried on a real volume group by `examples/pool.rs`.

use super::*;

/// After an image, a volume with a snapshot, somebody else's volumes and an unfinished thing.
const REPORT: &str = r#"  {
      "report": [
          {
              "lv": [
                  {"lv_name":"drover_image_b6b40b02bc46ce191b81334ed6e544fe615e52e166cf0f77a53c1d57889619c0", "lv_size":"12582912", "lv_tags":"drover,drover.bytes=10486272", "segtype":"thin", "pool_lv":"thin", "data_percent":"1.56", "metadata_percent":"", "lv_active":"active", "zero":"zero", "discards":"passdown", "lv_health_status":"", "lv_when_full":"", "vg_extent_size":"4194304"},
                  {"lv_name":"drover_new_ac6ab688-a5ea-416f-9b7a-4e95110a3e49", "lv_size":"12582912", "lv_tags":"drover", "segtype":"thin", "pool_lv":"thin", "data_percent":"", "metadata_percent":"", "lv_active":"", "zero":"zero", "discards":"passdown", "lv_health_status":"", "lv_when_full":"", "vg_extent_size":"4194304"},
                  {"lv_name":"drover_snapshot_00000000-0000-0000-0000-000000000002", "lv_size":"67108864", "lv_tags":"drover,drover.volume=00000000-0000-0000-0000-000000000001", "segtype":"thin", "pool_lv":"thin", "data_percent":"", "metadata_percent":"", "lv_active":"", "zero":"zero", "discards":"passdown", "lv_health_status":"", "lv_when_full":"", "vg_extent_size":"4194304"},
                  {"lv_name":"drover_volume_00000000-0000-0000-0000-000000000001", "lv_size":"67108864", "lv_tags":"drover", "segtype":"thin", "pool_lv":"thin", "data_percent":"50.00", "metadata_percent":"", "lv_active":"active", "zero":"zero", "discards":"passdown", "lv_health_status":"", "lv_when_full":"", "vg_extent_size":"4194304"},
                  {"lv_name":"drover_volume_00000000-0000-0000-0000-0000000000ff", "lv_size":"16777216", "lv_tags":"", "segtype":"thin", "pool_lv":"thin", "data_percent":"0.00", "metadata_percent":"", "lv_active":"active", "zero":"zero", "discards":"passdown", "lv_health_status":"", "lv_when_full":"", "vg_extent_size":"4194304"},
                  {"lv_name":"foreign", "lv_size":"16777216", "lv_tags":"", "segtype":"linear", "pool_lv":"", "data_percent":"", "metadata_percent":"", "lv_active":"active", "zero":"unknown", "discards":"", "lv_health_status":"", "lv_when_full":"", "vg_extent_size":"4194304"},
                  {"lv_name":"thin", "lv_size":"2147483648", "lv_tags":"", "segtype":"thin-pool", "pool_lv":"", "data_percent":"12.50", "metadata_percent":"11.23", "lv_active":"active", "zero":"zero", "discards":"passdown", "lv_health_status":"", "lv_when_full":"queue", "vg_extent_size":"4194304"}
              ]
          }
      ]
      ,
      "log": [
      ]
  }"#;

const NO_VG: &str = r#"{"report": [{"lv": []}], "log": [
    {"log_seq_num":"1", "log_type":"error", "log_context":"processing", "log_object_type":"vg", "log_object_name":"nope", "log_object_id":"", "log_object_group":"", "log_object_group_id":"", "log_message":"Volume group \"nope\" not found", "log_errno":"-1", "log_ret_code":"0"},
    {"log_seq_num":"2", "log_type":"error", "log_context":"processing", "log_object_type":"vg", "log_object_name":"nope", "log_object_id":"", "log_object_group":"", "log_object_group_id":"", "log_message":"Cannot process volume group nope", "log_errno":"-1", "log_ret_code":"0"},
    {"log_seq_num":"3", "log_type":"status", "log_context":"processing", "log_object_type":"vg", "log_object_name":"nope", "log_object_id":"", "log_object_group":"", "log_object_group_id":"", "log_message":"failure", "log_errno":"-1", "log_ret_code":"5"}]}"#;

fn lvs() -> Vec<Lv> {
    report::parse("lvs", REPORT.as_bytes()).unwrap()
}

fn inner() -> Inner {
    Inner {
        spec: "lvm:vgtest/thin".parse().unwrap(),
        vg: "vgtest".into(),
        thin_pool: "thin".into(),
        extent_bytes: 4 << 20,
        busy: Mutex::default(),
    }
}

fn named<'a>(lvs: &'a mut [Lv], name: &str) -> &'a mut Lv {
    lvs.iter_mut().find(|lv| lv.name == name).unwrap()
}

#[test]
fn a_report_is_read_and_ours_are_told_from_others() {
    let volume: VolumeId = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    let id = "b6b40b02bc46ce191b81334ed6e544fe615e52e166cf0f77a53c1d57889619c0".parse().unwrap();
    let kinds: Vec<Kind> = lvs().iter().map(|lv| kind(lv, "thin")).collect();
    let snapshot = "00000000-0000-0000-0000-000000000002".parse().unwrap();
    let expected = [
        Kind::Image { id, bytes: 10_486_272 },
        Kind::Leftover,
        Kind::Snapshot { volume, id: snapshot },
        Kind::Volume(volume),
        Kind::Stranger,
        Kind::Foreign,
        Kind::Foreign,
    ];
    assert_eq!(kinds, expected);
    assert!(lvs().iter().all(|lv| kind(lv, "another") == Kind::Foreign));

    let info = inner().find_volume(&lvs(), volume).unwrap().unwrap();
    assert_eq!((info.bytes, info.allocated_bytes, info.active), (64 << 20, Some(32 << 20), true));
    assert_eq!(
        info.path,
        Path::new("/dev/vgtest/drover_volume_00000000-0000-0000-0000-000000000001")
    );
    let snapshots = inner().find_snapshot(&lvs(), volume, snapshot).unwrap().unwrap();
    assert_eq!(snapshots.allocated_bytes, None, "LVM cannot tell while it is inactive");
}

/// Its name is ours, its tag is missing: neither used nor taken away.
#[test]
fn a_stranger_with_our_name_is_an_error() {
    let id = "00000000-0000-0000-0000-0000000000ff".parse().unwrap();
    let error = inner().find_volume(&lvs(), id).unwrap_err();
    assert!(matches!(error, PoolError::Foreign { .. }), "{error}");
}

#[test]
fn a_snapshot_of_another_volume_is_a_conflict() {
    let id = "00000000-0000-0000-0000-000000000002".parse().unwrap();
    let volume = "00000000-0000-0000-0000-000000000009".parse().unwrap();
    let error = inner().find_snapshot(&lvs(), volume, id).unwrap_err();
    assert!(matches!(error, PoolError::Conflict { .. }), "{error}");
}

#[test]
fn tags_that_make_no_sense_make_a_stranger() {
    for tags in
        [vec!["drover"], vec!["drover", "drover.bytes=12582913"], vec!["drover", "drover.bytes=x"]]
    {
        let mut lv = lvs()[0].clone();
        lv.tags = tags.iter().map(|tag| (*tag).into()).collect();
        assert_eq!(kind(&lv, "thin"), Kind::Stranger, "{tags:?}");
    }
}

#[test]
fn an_unfit_thin_pool_is_refused_with_what_would_put_it_right() {
    let refused = |change: &dyn Fn(&mut Vec<Lv>)| {
        let mut lvs = lvs();
        change(&mut lvs);
        inner().fit_pool(&lvs).unwrap_err().to_string()
    };
    inner().fit_pool(&lvs()).unwrap();
    let error = refused(&|lvs| named(lvs, "thin").zeroes = false);
    assert!(error.contains("lvchange --zero y vgtest/thin"), "{error}");
    let error = refused(&|lvs| named(lvs, "thin").discards = "ignore".into());
    assert!(error.contains("lvchange --discards passdown vgtest/thin"), "{error}");
    let error = refused(&|lvs| named(lvs, "thin").segtype = "linear".into());
    assert!(error.contains("vgtest/thin is linear, not a thin-pool"), "{error}");
    let error = refused(&|lvs| lvs.retain(|lv| lv.name != "thin"));
    assert!(error.contains("no logical volume thin"), "{error}");
}

/// A pool that takes nothing more says what its operator does.
#[test]
fn a_fault_says_what_would_put_it_right() {
    let fault = |health: &str, is_active: bool| {
        let mut lvs = lvs();
        let pool = named(&mut lvs, "thin");
        (pool.health, pool.is_active) = (health.to_owned(), is_active);
        inner().fault(pool)
    };
    assert_eq!(fault("", true), None);
    for (health, way) in [
        ("", "lvchange -ay vgtest/thin"),
        ("out_of_data", "lvextend -L +SIZE vgtest/thin"),
        ("metadata_read_only", "vgchange -an vgtest && lvchange -ay --config"),
        ("failed", "lvconvert --repair vgtest/thin"),
    ] {
        let said = fault(health, false).unwrap();
        assert!(said.starts_with(health) && said.contains(way), "{health}: {said}");
    }
}

#[test]
fn complaints_are_found_and_nonsense_is_an_error() {
    let said = report::complaints(NO_VG.as_bytes());
    assert_eq!(said, "Volume group \"nope\" not found; Cannot process volume group nope");
    assert_eq!(report::complaints(b"no JSON"), "");
    for (from, to) in [
        ("\"12582912\"", "\"12 MiB\""),
        ("\"1.56\"", "\"101.00\""),
        ("\"1.56\"", "\"NaN\""),
        ("\"lv_name\"", "\"name\""),
        ("{", "["),
    ] {
        let error = report::parse("lvs", REPORT.replacen(from, to, 1).as_bytes()).unwrap_err();
        assert!(matches!(error, PoolError::Report { .. }), "{from} to {to}: {error}");
    }
}
