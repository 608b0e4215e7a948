//! Writes qcow2 files for tests, each field open to be made wrong.

use std::io::Write;

use miniz_oxide::deflate::core::{
    CompressorOxide, TDEFLFlush, compress, create_comp_flags_from_zip_params,
};

pub(super) const MAGIC: u32 = super::MAGIC;

/// How a cluster is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    Hole,
    /// With the zero bit, and pointing at something else.
    Zero,
    Plain,
    Packed,
}

/// A file to be.
#[derive(Debug, Clone)]
pub(super) struct Fixture {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) zstd: bool,
    pub(super) size: u64,
    pub(super) clusters: Vec<(Cluster, Vec<u8>)>,
}

impl Fixture {
    /// The disk that it is.
    pub(super) fn content(&self) -> Vec<u8> {
        let cluster = 1_usize << self.cluster_bits;
        let mut content = vec![0; self.clusters.len() * cluster];
        for ((kind, data), target) in self.clusters.iter().zip(content.chunks_mut(cluster)) {
            if matches!(kind, Cluster::Plain | Cluster::Packed) {
                target[..data.len()].copy_from_slice(data);
            }
        }
        content.resize(self.size as usize, 0);
        content
    }

    /// The file: header, L1 table, L2 tables, data.
    pub(super) fn build(&self) -> Vec<u8> {
        let cluster = 1_usize << self.cluster_bits;
        let per_table = cluster / 8;
        let tables = self.clusters.len().div_ceil(per_table).max(1);
        let l1_clusters = (tables * 8).div_ceil(cluster);
        let header_clusters = 112_usize.div_ceil(cluster);
        let l2_at = (header_clusters + l1_clusters) * cluster;
        let mut file = vec![0; l2_at + tables * cluster];
        self.header(&mut file, tables as u32, (header_clusters * cluster) as u64);
        for table in 0..tables {
            let entry = (l2_at + table * cluster) as u64 | super::COPIED;
            put(&mut file, header_clusters * cluster + table * 8, &entry.to_be_bytes());
        }
        for (index, (kind, data)) in self.clusters.iter().enumerate() {
            if *kind != Cluster::Hole {
                let entry = self.place(*kind, data, &mut file);
                put(&mut file, l2_at + index * 8, &entry.to_be_bytes());
            }
        }
        file
    }

    fn header(&self, file: &mut [u8], l1_size: u32, l1_at: u64) {
        let mut put32 = |at: usize, value: u32| put(file, at, &value.to_be_bytes());
        put32(0, MAGIC);
        put32(4, self.version);
        put32(20, self.cluster_bits);
        put32(36, l1_size);
        if self.version == 3 {
            put32(76, u32::from(self.zstd) << 3);
            put32(96, 4);
            put32(100, 112);
            put32(104, u32::from(self.zstd) << 24);
        }
        put(file, 24, &self.size.to_be_bytes());
        put(file, 40, &l1_at.to_be_bytes());
    }

    fn place(&self, kind: Cluster, data: &[u8], file: &mut Vec<u8>) -> u64 {
        let cluster = 1_usize << self.cluster_bits;
        let mut whole = data.to_vec();
        whole.resize(cluster, 0);
        let packed = if self.zstd { zstd_frame(&whole) } else { deflate(&whole) };
        // As QEMU does: what does not become smaller is not packed.
        if kind != Cluster::Packed || packed.len() >= cluster {
            file.resize(file.len().next_multiple_of(cluster), 0);
            let at = file.len() as u64;
            file.extend_from_slice(&whole);
            return at | super::COPIED | u64::from(kind == Cluster::Zero);
        }
        let at = file.len();
        file.extend_from_slice(&packed);
        let sectors = (file.len() - 1) / 512 - at / 512;
        let shift = 62 - (self.cluster_bits - 8);
        super::COMPRESSED | (sectors as u64) << shift | at as u64
    }
}

pub(super) fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn zstd_frame(data: &[u8]) -> Vec<u8> {
    // As QEMU does: streamed, so that the frame does not say how much it holds.
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 0).unwrap();
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn deflate(data: &[u8]) -> Vec<u8> {
    let mut compressor = CompressorOxide::new(create_comp_flags_from_zip_params(6, -12, 0));
    let mut packed = vec![0; data.len() * 2 + 64];
    let (_, taken, made) = compress(&mut compressor, data, &mut packed, TDEFLFlush::Finish);
    assert_eq!(taken, data.len());
    packed.truncate(made);
    packed
}
