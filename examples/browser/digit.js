// What was drawn, as the data set has it: 8 x 8 shares of blocks of a 32 x 32 bitmap that the digit fills.

const FINE = 32;
const COARSE = 8;
const MARGIN = 1; // fine pixels

/**
 * @param {Uint8ClampedArray | number[]} ink one value of 0 to 255 per pixel, row by row
 * @param {number} width pixels in a row
 * @returns {Float32Array | null} 64 values of 0 to 1, row by row; null where nothing was drawn
 */
export function toDigit(ink, width) {
  const height = ink.length / width;
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (ink[y * width + x] > 127) {
        left = Math.min(left, x);
        right = Math.max(right, x);
        top = Math.min(top, y);
        bottom = Math.max(bottom, y);
      }
  if (right < 0) return null;
  const step = Math.max(right - left + 1, bottom - top + 1) / (FINE - 2 * MARGIN);
  const [startX, startY] = [(left + right + 1 - FINE * step) / 2, (top + bottom + 1 - FINE * step) / 2];
  const found = new Float32Array(COARSE * COARSE);
  const block = FINE / COARSE;
  for (let y = 0; y < FINE; y++)
    for (let x = 0; x < FINE; x++) {
      const [column, row] = [Math.floor(startX + (x + 0.5) * step), Math.floor(startY + (y + 0.5) * step)];
      const inside = column >= 0 && column < width && row >= 0 && row < height;
      if (inside && ink[row * width + column] > 127)
        found[Math.floor(y / block) * COARSE + Math.floor(x / block)] += 1 / block ** 2;
    }
  return found;
}
