// The button above a comparison: opens all equal stretches, or closes them again.
document.addEventListener("click", (event) => {
  const button = event.target.closest(".open-all");
  if (!button) {
    return;
  }
  const stretches = [...document.querySelectorAll(".diff details")];
  const open = stretches.some((stretch) => !stretch.open);
  for (const stretch of stretches) {
    stretch.open = open;
  }
  button.textContent = open ? "Close what is equal" : "Open what is equal";
});
