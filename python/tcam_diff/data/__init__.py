"""Reading, preparing and writing volumes."""

#: Default limit of the voxels (times channels) of a file: 1024^3.
VOXEL_BUDGET = 2**30

#: The data sets that find_cases reads.
LAYOUTS = (
    "a Decathlon task folder (dataset.json, imagesTr, labelsTr, imagesTs), a datalist (.json), a folder of BraTS cases "
    "(CASE/CASE_flair.nii.gz or CASE/CASE-t2f.nii.gz, ...), a folder of NIfTI files, a table (.csv) with a column image, a "
    "NIfTI file, an nnU-Net folder (imagesTr/CASE_0000.nii.gz, ...), or folders of DICOM series"
)
