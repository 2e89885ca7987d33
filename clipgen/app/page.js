// Escape stops the request, except in the list of models, which it closes.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.target.closest("#model")) {
    document.querySelector("#stop")?.click();
  }
  if (event.key === "Enter" && event.target.matches("[role=tabpanel] input, [role=tabpanel] textarea")) {
    showResults();
  }
});

document.addEventListener("click", (event) => {
  if (event.target.closest("[id^=generate-]")) {
    showResults();
  }
});

// On a narrow screen the images are below the settings.
function showResults() {
  if (window.innerWidth < 768) {
    document.querySelector("#status")?.scrollIntoView({ behavior: "smooth", block: "start" });
  }
}
