//! A curve without its noise.

/// Mean of each point and all others, with weights `βᵈ` at a distance of d points: on both sides, so that the
/// line does not lag behind, and at an end on the one that there is. None of its own where points are few.
pub(super) fn smooth(points: &[(f64, f64)]) -> Option<Vec<(f64, f64)>> {
    const FEW: usize = 40;
    if points.len() < FEW {
        return None;
    }
    let beta = 1.0 - 1.0 / (points.len() as f64 / (2.0 * FEW as f64) + 2.0);
    // Σ βᵈ·x and Σ βᵈ over all points before, and after; either has the point itself.
    let sums = |values: &mut dyn Iterator<Item = f64>| -> Vec<(f64, f64)> {
        let next = |sums: &mut (f64, f64), value: f64| {
            *sums = (beta * sums.0 + value, beta * sums.1 + 1.0);
            Some(*sums)
        };
        values.scan((0.0, 0.0), next).collect()
    };
    let before = sums(&mut points.iter().map(|point| point.1));
    let mut after = sums(&mut points.iter().rev().map(|point| point.1));
    after.reverse();
    let sides = before.into_iter().zip(after);
    let mean = |(left, right): ((f64, f64), (f64, f64)), &(step, value): &(f64, f64)| {
        (step, (left.0 + right.0 - value) / (left.1 + right.1 - 1.0))
    };
    Some(sides.zip(points).map(|(sides, point)| mean(sides, point)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_of_both_sides_and_does_not_lag() {
        assert!(smooth(&[(1.0, 2.0); 39]).is_none());
        let points: Vec<(f64, f64)> = (0..41).map(|i| (f64::from(i), 3.0)).collect();
        let flat = smooth(&points).unwrap();
        assert!(flat.iter().all(|(_, value)| (value - 3.0).abs() < 1e-12));
        let ramp: Vec<(f64, f64)> = (0..41).map(|i| (f64::from(i), f64::from(i))).collect();
        let smoothed = smooth(&ramp).unwrap();
        // As many points on either side, but for a weight that is next to nothing.
        assert!(smoothed[15..26].iter().all(|(step, mean)| (mean - step).abs() < 1e-2));
        // β = 1 − 1 / 2.5125 for 41 points: a spike leaves β of itself to each neighbour.
        let spike: Vec<(f64, f64)> =
            (0..41).map(|i| (f64::from(i), f64::from(u8::from(i == 20)))).collect();
        let spread = smooth(&spike).unwrap();
        let beta = 1.0 - 1.0 / 2.5125;
        assert!((spread[21].1 / spread[20].1 - beta).abs() < 1e-4, "{:?}", spread[21]);
        assert!((spread[19].1 - spread[21].1).abs() < 1e-12);
        // An end has a mean of its own side: (1 − β) of itself, about, and no less smooth than the rest.
        for end in [0, 40] {
            let spike = |i| f64::from(u8::from(i == end));
            let points: Vec<(f64, f64)> = (0..41).map(|i| (f64::from(i), spike(i))).collect();
            let at = smooth(&points).unwrap()[end as usize].1;
            assert!((at - (1.0 - beta)).abs() < 1e-4, "{at}");
        }
    }
}
