"use strict";
// Paired differences of two cells, by the formulas of teq/statistics.py.

function logGamma(x) {  // Lanczos (1964), g = 7
  const c = [0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
    12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7];
  const t = x + 6.5;
  const sum = c.reduce((total, value, i) => (i ? total + value / (x - 1 + i) : value), 0);
  return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(sum);
}

// I_x(a, b), by the continued fraction of Numerical Recipes 6.4.
function incompleteBeta(x, a, b) {
  if (x <= 0 || x >= 1) return x <= 0 ? 0 : 1;
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x)) / a;
  let c = 1;
  let d = 1 / (1 - ((a + b) * x) / (a + 1));
  let fraction = d;
  for (let m = 1; m < 1000; m += 1) {
    const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
    const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    let change = 1;
    for (const term of [even, odd]) {
      d = 1 / (1 + term * d);
      c = 1 + term / c;
      change = c * d;
      fraction *= change;
    }
    if (Math.abs(change - 1) < 1e-14) break;
  }
  return front * fraction;
}

// The two-sided p value of Student's t, and the t whose p value is 0.05.
const tProbability = (t, freedom) => incompleteBeta(freedom / (freedom + t * t), freedom / 2, 0.5);
function tQuantile(freedom) {
  let [low, high] = [0, 2];
  while (tProbability(high, freedom) > 0.05) high *= 2;
  for (let i = 0; i < 60; i += 1) {
    const middle = (low + high) / 2;
    if (tProbability(middle, freedom) > 0.05) low = middle;
    else high = middle;
  }
  return high;
}

// The exact p value of McNemar's test.
function mcnemar(gained, lost) {
  const fewer = Math.min(gained, lost);
  return Math.min(1, 2 * (gained === lost ? 1 : incompleteBeta(0.5, gained + lost - fewer, fewer + 1)));
}

const mean = (values) => values.reduce((total, value) => total + value, 0) / values.length;
const variance = (values) => {
  const middle = mean(values);
  return values.reduce((total, value) => total + (value - middle) ** 2, 0) / (values.length - 1);
};

// Mean, 95 % interval and p of `parts`, the differences [seeds][n] of each metric; null where undefined.
function pairedDifference(parts) {
  if (parts.some((part) => part[0].length < 2)) return null;
  const seeds = parts[0].length;
  const middle = mean(parts.map((part) => mean(part.map(mean))));
  const components = parts.map((part) => {
    const windows = part[0].map((_, i) => mean(part.map((seed) => seed[i])));
    return [variance(windows) / windows.length / parts.length ** 2, windows.length - 1];
  });
  if (seeds > 1) {
    const bySeed = parts[0].map((_, seed) => mean(parts.map((part) => mean(part[seed]))));
    components.push([variance(bySeed) / seeds, seeds - 1]);
  }
  const total = components.reduce((sum, [part]) => sum + part, 0);
  if (total === 0) return { mean: middle, low: middle, high: middle, p: Number(middle === 0) };
  const freedom = total ** 2 / components.reduce((sum, [part, own]) => sum + part ** 2 / own, 0);
  const half = tQuantile(freedom) * Math.sqrt(total);
  return {
    mean: middle, low: middle - half, high: middle + half, p: tProbability(middle / Math.sqrt(total), freedom),
  };
}

// What two cells differ in, A minus B, from the values in `records`; null where they did not measure the same.
function compareCells(records, namesA, namesB, cell) {
  const seeds = Math.max(namesA.length, namesB.length);
  const usable = [namesA, namesB].every((names) => names.length === 1 || (names.length === seeds && seeds > 1));
  if (!usable || !cell.factor || !cell.metrics.length) return null;
  const units = new Set();
  const parts = [];
  for (const metric of cell.metrics) {
    const part = [];
    for (let i = 0; i < seeds; i += 1) {
      const [a, b] = [namesA, namesB].map((names) => records[names[i % names.length]].arrays[metric]);
      if (!a || !b || a.on !== b.on || a.values.length !== b.values.length) return null;
      units.add(a.unit);
      part.push([...a.values].map((value, j) => Number(value) - Number(b.values[j])));
    }
    parts.push(part);
  }
  const found = pairedDifference(parts);
  if (!found || units.size !== 1) return null;
  const unit = [...units][0];
  const n = parts.reduce((sum, part) => sum + part[0].length, 0);
  const scale = (value) => (unit === "%" ? 100 * Math.expm1(value) : cell.factor * value);
  const out = { unit, n, parts, p: found.p, ...Object.fromEntries(["mean", "low", "high"].map((k) => [k, scale(found[k])])) };
  const single = parts.length === 1 && seeds === 1 ? parts[0][0] : null;
  if (single?.every((value) => [-1, 0, 1].includes(value))) {
    out.gained = single.filter((value) => value > 0).length;
    out.lost = single.filter((value) => value < 0).length;
    out.p = mcnemar(out.gained, out.lost);
  }
  return out;
}
