//! How figures spread: pure.

use std::fmt;

use serde_json::{Value, json};

/// Quantiles of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) min: f64,
    pub(super) p25: f64,
    pub(super) p50: f64,
    pub(super) p75: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Of at least one figure; between two of them it goes straight.
    pub(super) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        assert!(!sorted.is_empty(), "nothing was measured");
        sorted.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let place = q * (sorted.len() - 1) as f64;
            let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            low + (high - low) * place.fract()
        };
        Self { min: at(0.0), p25: at(0.25), p50: at(0.5), p75: at(0.75), max: at(1.0) }
    }

    /// For the last line; three digits after the point.
    pub(super) fn json(&self) -> Value {
        json!({
            "min": rounded(self.min), "p25": rounded(self.p25), "p50": rounded(self.p50),
            "p75": rounded(self.p75), "max": rounded(self.max),
        })
    }
}

/// Three digits after the point.
pub(super) fn rounded(figure: f64) -> f64 {
    (figure * 1000.0).round() / 1000.0
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, figure) in
            [self.min, self.p25, self.p50, self.p75, self.max].into_iter().enumerate()
        {
            let gap = if index == 0 { "" } else { " " };
            write!(f, "{gap}{figure:>9.2}")?;
        }
        Ok(())
    }
}

/// The heading over rows of [`Spread`].
pub(super) fn heading() -> String {
    format!("{:<24} {:>9} {:>9} {:>9} {:>9} {:>9}", "", "min", "p25", "p50", "p75", "max")
}

/// One row.
pub(super) fn row(label: &str, spread: &Spread) -> String {
    format!("{label:<24} {spread}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order in which figures came does not matter, and quantiles lie between neighbours.
    #[test]
    fn quantiles_go_straight_between_neighbours() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]);
        assert_eq!((spread.min, spread.p25, spread.p50), (1.0, 1.75, 2.5));
        assert_eq!((spread.p75, spread.max), (3.25, 4.0));
    }

    /// One figure is every quantile.
    #[test]
    fn one_figure_is_enough() {
        let spread = Spread::of([7.0]);
        assert_eq!((spread.min, spread.p50, spread.max), (7.0, 7.0, 7.0));
    }
}
